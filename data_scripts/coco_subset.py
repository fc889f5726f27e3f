"""Copy a few images of COCO with some of its classes, to see whether a detector learns.

    python data_scripts/coco_subset.py COCO --out data/coco-few --images 8 --most 3 --least 0.15 --same
    python data_scripts/coco_subset.py COCO --out data/coco-person --classes person

The result has COCO's layout: annotations/instances_{train,val}2017.json, {train,val}2017/.
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path


def chosen(content: dict, classes: list[str], images: int, most: int, least: float) -> dict:
    """The annotations of the first images that have 1 to `most` objects of these classes, none smaller than `least`.

    Args:
        content: of an instances file of COCO.
        classes: names; all classes if there are none.
        images: how many at most.
        most: objects of an image.
        least: root of an object's area, relative to the longer side of its image.
    """
    categories = [one for one in content["categories"] if not classes or one["name"] in classes]
    ids, objects = {one["id"] for one in categories}, {}
    for one in content["annotations"]:
        if one["category_id"] in ids:
            objects.setdefault(one["image_id"], []).append(one)

    def fits(image: dict) -> bool:
        own, side = objects.get(image["id"], []), max(image["width"], image["height"])
        return 1 <= len(own) <= most and all(math.sqrt(o["bbox"][2] * o["bbox"][3]) >= least * side for o in own)

    kept = [image for image in content["images"] if fits(image)][:images]
    annotations = [one for image in kept for one in objects[image["id"]]]
    return {**content, "categories": categories, "images": kept, "annotations": annotations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, help="a folder with annotations/, train2017/ and val2017/")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--classes", nargs="*", default=[], help="names of classes; by default all")
    parser.add_argument("--images", type=int, default=10**9, help="of a split, at most")
    parser.add_argument("--most", type=int, default=10**9, help="objects of an image")
    parser.add_argument(
        "--least", type=float, default=0.0, help="side of an object, relative to its image's longer side"
    )
    parser.add_argument("--same", action="store_true", help="the training images are the test images, too")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: choose a new folder")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:  # --out gets its name when all is there
        made = Path(folder) / "made"
        (made / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            source = "train" if options.same else split
            file = options.coco / "annotations" / f"instances_{source}2017.json"
            if not file.is_file():
                parser.error(f"{file} is not there: give a folder in COCO's layout")
            content = json.loads(file.read_text(encoding="utf-8"))
            content = chosen(content, options.classes, options.images, options.most, options.least)
            if not content["images"]:
                parser.error(f"no image of {source}2017 fits: loosen --classes, --most or --least")
            (made / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
            (made / f"{split}2017").mkdir()
            for image in content["images"]:
                shutil.copy(options.coco / f"{source}2017" / image["file_name"], made / f"{split}2017")
            print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects")
        made.rename(options.out)


if __name__ == "__main__":
    main()
