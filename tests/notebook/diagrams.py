"""Three diagrams that use every word of the vocabulary; the tests draw them, and a person may look at them."""

from sslbook.notebook.schematic import Diagram


def simclr() -> Diagram:
    d = Diagram(
        alt="An image becomes two views; one backbone f and one projector g map both to z and z', which the loss pulls "
        "together. The backbone is kept, the projector is thrown away.",
        caption="SimCLR compares two views of one image. Only the backbone is kept.",
    )
    x = d.image(0, 0.5, "image")
    loss = d.loss(6, 0.5, "NT-Xent")
    for row, prime in ((0, ""), (1, "′")):
        v = d.view(1, row, f"view x{prime}")
        f = d.network(2, row, "backbone", "f", kept=row == 0)
        h = d.vector(3, row, f"h{prime}")
        g = d.network(4, row, "projector", "g", thrown=row == 0)
        z = d.vector(5, row, f"z{prime}")
        d.arrow(x, v, "augment" if row == 0 else "")
        for a, b in ((v, f), (f, h), (h, g), (g, z), (z, loss)):
            d.arrow(a, b)
    return d


def byol() -> Diagram:
    d = Diagram(
        alt="An online network predicts the projection of an EMA target network; the gradient stops at the target.",
        caption="BYOL has no negatives: a predictor, a stop-gradient and an EMA target take their place.",
        title="BYOL",
    )
    x = d.image(0, 0.75, "image")
    v, w = d.view(1, 0, "view x"), d.view(1, 1.5, "view x′")
    f = d.network(2, 0, "backbone", "f", kept=True)
    g = d.network(3, 0, "projector", "g", thrown=True)
    q = d.network(4, 0, "predictor", "q", thrown=True)
    fm, gm = d.ema_network(2, 1.5, "target", "f′"), d.ema_network(3, 1.5, "target", "g′")
    loss = d.loss(6, 0.75, "squared\ndistance")
    p, z = d.vector(5, 0, "q(z)"), d.vector(4, 1.5, "z′")
    for a, b in ((x, v), (x, w), (v, f), (f, g), (g, q), (q, p), (p, loss), (w, fm), (fm, gm), (gm, z)):
        d.arrow(a, b)
    d.arrow(z, loss, stop=True)
    d.ema(f, fm)
    d.ema(g, gm, "")
    return d


def mae() -> Diagram:
    d = Diagram(
        alt="The encoder sees a quarter of the patches; a small decoder fills in mask tokens and predicts the rest.",
        caption="MAE encodes visible patches only. The decoder is thrown away.",
    )
    x = d.image(0, 0, "image")
    p = d.patches(1, 0, "mask 75 %", visible="1000 0010 0100 0001")
    e = d.network(2, 0, "encoder", "f", kept=True)
    h = d.vector(3, 0, "features")
    t = d.frozen(3, 1, "teacher", "t")
    m = d.patches(4, 0, "with mask\ntokens", visible="1000 0010 0100 0001")
    g = d.network(5, 0, "decoder", "g", widens=True, thrown=True)
    loss = d.loss(6.1, 0, "squared\nerror")
    for a, b in ((x, p), (p, e), (e, h), (h, m), (m, g), (g, loss)):
        d.arrow(a, b)
    d.arrow(x, t, out="bottom")
    d.arrow(t, loss, "target", stop=True, into="bottom")
    return d
