"""Cut the people of street.json out of the film, and write them as a set in the layout of CUHK-PEDES.

    python -m tests.street VIDEO OUTDIR

VIDEO is vtest.avi, which the package opencv-doc of Debian and Ubuntu carries. It needs OpenCV and Pillow and nothing
else of this project's packages, so it runs in an environment of its own. README.md says what comes out. Read next:
spread.py.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from mra.config import UserError

STREET = json.loads(Path(__file__).with_name("street.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="vtest.avi")
    parser.add_argument("out", type=Path, help="folder for the set")
    given = parser.parse_args()
    try:
        check_film(given.video)
        write_set(frames_of(given.video), given.out)
    except (UserError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def check_film(video: Path) -> None:
    """Raise UserError unless the file is the annotated film: in another one the boxes would show other things."""
    try:
        found = hashlib.sha256(video.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{video} cannot be read ({error.strerror}); the package opencv-doc has the film.") from None
    film = STREET["film"]
    if found != film["sha256"]:
        raise UserError(f"{video} is not the annotated {film['name']}: its sha256 is {found}, not {film['sha256']}.")


def frames_of(video: Path) -> Iterator[Image.Image]:
    """The frames of the film. Raises UserError where OpenCV is missing."""
    try:
        import cv2  # here: no other part of this project needs it
    except ImportError:
        raise UserError('OpenCV is missing: pip install "opencv-python-headless<5" pillow, best in an environment of '
                        "its own.") from None
    film = cv2.VideoCapture(str(video))
    while True:
        good, pixels = film.read()                      # (H, W, 3), blue first
        if not good:
            return
        yield Image.fromarray(pixels[:, :, ::-1])


def split_of(frame: int) -> str:
    """The split by time."""
    return "test" if frame >= STREET["test_from"] else "train"


def write_set(frames: Iterable[Image.Image], out: Path) -> None:
    """Write the annotated crops as CUHK-PEDES, the others as pictures alone, and the test people's sentences.

    A record of train has the two first sentences of its person, a record of test the ten further ones. Raises UserError
    if the film ends before the last annotated frame.
    """
    wanted, records = {}, []            # frame: a box and a file for each of its crops
    for frame, *box, person, _ in STREET["people"]:
        split, captions = split_of(frame), STREET["captions"][str(person)]
        name = f"{split}/f{frame:03}_p{person}.png"
        records.append({"split": split, "captions": captions["further" if split == "test" else "first"],
                        "file_path": name, "id": person})
        wanted.setdefault(frame, []).append((box, out / "CUHK-PEDES/imgs" / name))
    for frame, *box in STREET["unlabelled"]:
        wanted.setdefault(frame, []).append((box, out / f"unlabelled/f{frame:03}_x{box[0]}.png"))
    for folder in {file.parent for crops in wanted.values() for _, file in crops}:
        folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        for box, file in wanted.pop(number, []):
            frame.crop(box).save(file)
    if wanted:
        raise UserError(f"OpenCV cannot read the film to its end: {len(wanted)} annotated frames are missing, the "
                        f"first is {min(wanted)}; install another version of OpenCV.")
    people = sorted({record["id"] for record in records if record["split"] == "test"})
    sentences = [sentence for person in people for sentence in STREET["captions"][str(person)]["further"]]
    (out / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    (out / "CUHK-PEDES/reid_raw.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {len(records)} annotated crops, {len(STREET['unlabelled'])} others and {len(sentences)} sentences "
          f"to {out}.")
