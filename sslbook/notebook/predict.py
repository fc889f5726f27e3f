"""A prediction to make before running: a question whose options are buttons, answered without a kernel or a network.

A click says whether the option is right, in words and a mark besides the color, and why it tempts. Every option may be
tried. Without scripts the folded list below the buttons holds the answers.

>>> predict("Which crops does a color histogram pair?", {"few": "It knows no shapes.", "most": "Crops share colors."},
...         answer="most")
"""

import html
from collections.abc import Mapping

from sslbook.errors import UserError, require_known
from sslbook.notebook.style import prose

RIGHT, WRONG = "✓", "✗"

# Inline, not a <script>: notebooks insert outputs by innerHTML, which runs handlers but no scripts.
_CHOOSE = """
var box=this.closest('.sslbook-predict'),at=[].indexOf.call(box.querySelectorAll('button'),this),
answer=box.querySelectorAll('details dd')[at],right=answer.textContent.trim().charAt(0)==='✓';
this.setAttribute('aria-pressed','true');
this.style.borderWidth='2px';
this.style.borderStyle=right?'solid':'dashed';
this.style.borderColor=right?'#009e73':'#d55e00';
this.querySelector('.mark').textContent=right?'✓':'✗';
this.nextElementSibling.innerHTML=answer.innerHTML
""".replace("\n", "")

_BUTTON = (
    "display:flex;gap:.6em;align-items:center;width:100%;min-height:2.75em;padding:.5em .8em;text-align:left;"
    "font:inherit;color:inherit;background:transparent;border:1px solid #7c7c7c;border-radius:.4em;cursor:pointer"
)


class Prediction:
    """A question and its options; made by `predict`."""

    def __init__(self, question: str, options: dict[str, str], answer: str):
        self.question, self.options, self.answer = question, options, answer

    def _repr_html_(self) -> str:
        buttons, answers = [], []
        for option, why in self.options.items():
            mark = '<span class="mark" aria-hidden="true" style="min-width:1em">○</span>'
            buttons.append(
                f'<div style="margin:.4em 0"><button type="button" aria-pressed="false" style="{_BUTTON}" '
                f'onclick="{html.escape(_CHOOSE)}">{mark}<span>{prose(option)}</span></button>'
                '<div role="status" style="padding:.15em .8em 0 2.4em"></div></div>'
            )
            verdict = f"{RIGHT} Right." if option == self.answer else f"{WRONG} No."
            answers.append(f"<dt>{prose(option)}</dt><dd><strong>{verdict}</strong> {prose(why)}</dd>")
        return (
            '<div class="sslbook-predict" style="max-width:44em;margin:1em 0;padding:.2em 1em .8em;'
            'border-left:4px solid #1a7fc4">'
            f'<p style="margin:.6em 0"><strong>Predict first.</strong> {prose(self.question)}</p>'
            f'<div role="group" aria-label="{html.escape(self.question)}">{"".join(buttons)}</div>'
            '<details style="margin-top:.6em"><summary style="cursor:pointer">All answers</summary>'
            f"<dl>{''.join(answers)}</dl></details></div>"
        )

    def __repr__(self) -> str:
        return "\n".join(["Predict first. " + self.question, *(f"  ( ) {option}" for option in self.options)])


def predict(question: str, options: Mapping[str, str], *, answer: str) -> Prediction:
    """A clickable question, to be answered before the cell that settles it is run.

    Args:
        question: one or two sentences; `code` in backticks, no formulas in TeX.
        options: for each option in words, why it tempts, or why it is right.
        answer: the option that is right.

    Raises:
        UserError: fewer than two options, one without an explanation, or an answer that is none of them.
    """
    if len(options) < 2:
        raise UserError(f"a prediction needs two options or more, not {len(options)}: {{option: why it tempts}}")
    require_known(answer, options, f"the answer {answer!r} is none of the options")
    if bare := [option for option, why in options.items() if not why.strip()]:
        raise UserError(f"the option {bare[0]!r} has no explanation: say why it tempts, or why it is right")
    return Prediction(question, dict(options), answer)
