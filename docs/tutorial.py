"""A tutorial: from two photographs to a service that has been attacked, corrected and audited, in under two minutes.

    python docs/tutorial.py                     # writes runs/tutorial/
    python docs/tutorial.py --out FOLDER
    python docs/tutorial.py --photos FOLDER     # only the photographs, for docs/quick-start.md

It needs what `make setup` installs (`pip install 'hardlook[service,offline,demo]'`), and no network, GPU or data: the
photographs are those that ship inside scikit-image and scikit-learn, the encoders those that ship inside hardlook. Read
it from `main` at the end upwards, or run it and read what it prints. Each chapter is one function, and the comments say
what a person who has never seen the project would ask.

Everything that it starts it stops, and everything that it writes outside the output folder it removes.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from indexer.build import build
from indexer.sources import FolderSource
from indexer.store import SnapshotStore
from offline.attacks.apgd import Apgd
from offline.audit.plan import plan_from_table
from offline.audit.report import Run, write_report
from offline.audit.run import run_audit
from offline.audit.tables import table
from offline.objectives import TargetSet
from offline.threat import ThreatModel
from perception import Encoder, encode_images, load_encoder, to_pixels
from perception.encoder import open_image
from perception.testing import encoded
from service.client import HardlookClient
from service.key_file import create_key
from service.wire import ClassifyAnswer, ClassifyItem

CLEAN, ROBUST = "bundled/clean", "bundled/fare4"
EPS = 4 / 255  # the most that the attacker may change a value of a pixel by, of 1
STEPS = 30
START_TIMEOUT_S = 120.0
# Public photographs inside Python packages: name, package, file.
PHOTOS = (
    ("cat", "skimage", "data/chelsea.png"),
    ("coffee", "skimage", "data/coffee.png"),
    ("rocket", "skimage", "data/rocket.jpg"),
    ("motorcycle", "skimage", "data/motorcycle_left.png"),
    ("blur", "skimage", "data/clock_motion.png"),
    ("astronaut", "skimage", "data/astronaut.png"),
    ("temple", "sklearn", "datasets/images/china.jpg"),
    ("flower", "sklearn", "datasets/images/flower.jpg"),
)
# The rule of our imaginary site: no vehicles. What is too blurred to tell goes to a person.
POOL_OF = {
    "cat": "safe",
    "coffee": "safe",
    "temple": "safe",
    "flower": "safe",
    "blur": "buffer",
    "rocket": "unsafe",
    "motorcycle": "unsafe",
}


def say(text: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(" ".join(text.split()), width=100), flush=True)


def chapter(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title} ==\n", flush=True)


def photographs() -> dict[str, Image.Image]:
    """The photographs by name, as RGB."""
    return {
        name: open_image(Path(str(import_module(package).__file__)).parent / file) for name, package, file in PHOTOS
    }


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """A part of an image, its edges as shares of width and height."""
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


# --- 1. what an encoder sees -----------------------------------------------------------------------------------------


def look(encoders: Mapping[str, Encoder], photos: Mapping[str, Image.Image]) -> None:
    """Similarities of two photographs, and of one to a changed copy of itself."""
    chapter("1. What an encoder sees")
    say(
        "An encoder turns a picture into a direction in a space of 256 dimensions. Two pictures are as similar as "
        "these directions: the cosine of the angle between them, 1 for the same and about 0 for pictures that have "
        "nothing to do with each other. Verdicts and searches compare nothing else."
    )
    mirrored = cut(ImageOps.mirror(photos["cat"]), 0.1, 0.1, 0.9, 0.9)
    for name, encoder in encoders.items():
        cat, coffee, copy = encode_images(encoder, [photos["cat"], photos["coffee"], mirrored])
        say(f"{name}: cat and coffee {float(cat @ coffee):.2f}; cat and the same cat, mirrored and cut "
            f"{float(cat @ copy):.2f}.")  # fmt: skip


# --- 2. an attack ----------------------------------------------------------------------------------------------------


def attack(encoders: Mapping[str, Encoder], photos: Mapping[str, Image.Image], out: Path) -> Image.Image:
    """Make the cat look like the rocket; returns the picture that fools the clean encoder."""
    chapter("2. A change that nobody sees")
    say(
        f"The attacker changes each value of a pixel by at most 4 of 255 levels ({EPS:.4f}), which the eye does not "
        "notice, and looks for the change that brings the cat closest to the rocket. APGD does it by following the "
        f"gradient of the encoder, {STEPS} steps of it (the paper takes 100 to 200)."
    )
    threat = ThreatModel("linf", EPS)
    names = list(photos)
    rows, fooling = [], photos["cat"]
    for name, encoder in encoders.items():
        embeddings = encode_images(encoder, list(photos.values()))
        pixels = to_pixels([encoder.preprocess.apply(photos["cat"])])  # (1, 3, 128, 128) in [0, 1]
        towards_rocket = TargetSet(embeddings[[names.index("rocket")]])
        generator = torch.Generator().manual_seed(0)  # of the random start: the same in every run
        found = Apgd(steps=STEPS).attack(encoder, towards_rocket, None, pixels, threat, generator=generator)
        # An attack is not believed: the ball is checked, and the picture is judged anew.
        threat.require(found.adversarial, pixels, "APGD")
        with torch.inference_mode():
            similarity = encoder.encode(found.adversarial)[0] @ embeddings.T
        to_cat, to_rocket = (float(similarity[names.index(other)]) for other in ("cat", "rocket"))
        nearest = names[int(similarity.argmax())]
        say(f"{name}: the attacked cat is {to_cat:.2f} similar to the cat and {to_rocket:.2f} to the rocket. It is "
            f"nearest to the {nearest}.")  # fmt: skip
        rows.append((pixels[0], found.adversarial[0]))
        if name == CLEAN:
            fooling = picture(found.adversarial[0])
    draw_attack(rows, list(encoders), out / "attack.png")
    say(
        f"{ROBUST} is {CLEAN} after FARE: fine-tuning that asks the attacked picture to stay where the original "
        f"encoder had put the clean one. {out / 'attack.png'} shows before, the change (20 times as strong), and after."
    )
    return fooling


def picture(pixels: torch.Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] as an 8-bit picture, rounded as a PNG file rounds."""
    levels = (pixels.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def draw_attack(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], names: Sequence[str], path: Path) -> None:
    """One row an encoder: the picture, the change, the attacked picture."""
    side, gap, heading = 256, 8, 24
    sheet = Image.new("RGB", (3 * side + 4 * gap, len(rows) * (side + heading + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((before, after), name) in enumerate(zip(rows, names, strict=True)):
        top = gap + number * (side + heading + gap)
        pen.text((gap, top + 4), f"{name}: before, change x 20, after", fill="black")
        panels = (before, 0.5 + 20 * (after - before), after)
        for column, pixels in enumerate(panels):
            panel = picture(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(panel, (gap + column * (side + gap), top + heading))
    sheet.save(path)


# --- 3. pools --------------------------------------------------------------------------------------------------------


def make_pools(encoders: Mapping[str, Encoder], photos: Mapping[str, Image.Image], work: Path) -> None:
    """Three views of each photograph in the folders safe, buffer and unsafe; pools of both encoders from them."""
    chapter("3. Pools: what the service knows")
    say(
        "A verdict is the pool of the most similar exemplar. So what is allowed is not trained into a network: it is a "
        "folder of examples, and changing it changes the next answer. Ours: cat, coffee, temple and flower are safe; "
        "rocket and motorcycle are unsafe; a blurred clock is in the buffer, for which the answer is 'review'."
    )
    write_pools(photos, work / "photos")
    for name, encoder in encoders.items():
        root = work / name
        # What `hardlook-index build --from-folder` does. The snapshot carries the fingerprint of its encoder, and is
        # refused under another one: embeddings of two encoders must never be compared.
        source = FolderSource(work / "photos", "pools")
        report = build(encoder, source, collection="pools", work_dir=root / ".build")
        version = SnapshotStore(root, "pools").publish(report.contents)
        # What `hardlook-index export` does, for the audit at the end.
        SnapshotStore(root, "pools").load(encoder.fingerprint).to_gallery().save(work / gallery_name(name))
        say(f"{name}: published version {version}, {report.contents.counts}.")


def write_pools(photos: Mapping[str, Image.Image], root: Path) -> None:
    """The files that pools are built from: three views of each photograph, in the folder of its pool."""
    for name, pool in POOL_OF.items():
        (root / pool).mkdir(parents=True, exist_ok=True)
        photos[name].save(root / pool / f"{name}-whole.png")
        ImageOps.mirror(photos[name]).save(root / pool / f"{name}-mirrored.png")
        cut(photos[name], 0.1, 0.1, 0.9, 0.9).save(root / pool / f"{name}-centre.png")


def write_photographs(photos: Mapping[str, Image.Image], root: Path) -> None:
    """What docs/quick-start.md starts from: files for pools, and others to ask about."""
    write_pools(photos, root / "pools")
    (root / "ask").mkdir(exist_ok=True)
    photos["cat"].reduce(2).save(root / "ask" / "cat.jpg", quality=60)
    photos["motorcycle"].reduce(2).save(root / "ask" / "motorcycle.webp", quality=80)
    photos["astronaut"].save(root / "ask" / "portrait.jpg", quality=90)
    ImageOps.mirror(photos["astronaut"]).save(root / "ask" / "portrait-mirrored.jpg", quality=90)
    print(f"wrote {root / 'pools'}, with a folder for each pool, and {root / 'ask'}")


def gallery_name(encoder: str) -> str:
    """File name of an encoder's exported pools."""
    return f"{encoder.rpartition('/')[2]}.safetensors"


# --- 4. the service --------------------------------------------------------------------------------------------------


@contextmanager
def serving(work: Path) -> Iterator[HardlookClient]:
    """The service over the pools of the robust encoder, in a process of its own, on loopback, for one key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `hardlook-serve keys create` does. The file has a hash; the key itself is seen once, here.
    key, _ = create_key(work / "keys.json", "tutorial", ("admin",), None, None)
    settings = {"ENCODER": ROBUST, "POOLS": work / ROBUST, "PORT": port, "KEYS_FILE": work / "keys.json",
                "DEVICE": "cpu", "LOG_LEVEL": "WARNING"}  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("HARDLOOK_")}
    environment |= {f"HARDLOOK_{name}": str(value) for name, value in settings.items()}
    # What `hardlook-serve` is.
    process = subprocess.Popen([sys.executable, "-c", "from service.cli import main; main()"], env=environment)
    try:
        with HardlookClient(f"http://127.0.0.1:{port}", api_key=key) as client:
            until_s = time.monotonic() + START_TIMEOUT_S
            while not client.is_ready():
                if process.poll() is not None or time.monotonic() > until_s:
                    sys.exit("tutorial: the service did not become ready; what it wrote above says why")
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(client: HardlookClient, photos: Mapping[str, Image.Image], fooling: Image.Image) -> None:
    """Classify photographs that are not in the pools as they are sent, and the attacked cat."""
    chapter("4. The service answers")
    say(f"The service runs {ROBUST} with these pools. It is asked over HTTP by the typed client that ships with it.")
    sent = {
        "the cat, half size, JPEG": encoded(photos["cat"].reduce(2), "JPEG", quality=60),
        "the motorcycle, grey": encoded(ImageOps.grayscale(photos["motorcycle"])),
        f"the attacked cat that fools {CLEAN}": encoded(fooling),
    }
    for name, file in sent.items():
        _, result = judged(client, name, file)
        say(f"{name}: {shown(result)}")
    [found] = client.similar(text="a motorcycle", k=1).results
    if found.status == "ok":
        say(f"And by text, 'a motorcycle': the nearest exemplar is {found.neighbors[0].id}.")


def judged(client: HardlookClient, name: str, file: bytes) -> tuple[ClassifyAnswer, ClassifyItem]:
    """The answer about one image, and its only result."""
    answer = client.classify([(name, file)])
    [result] = answer.results
    if result.status != "ok":  # an error is never a verdict
        sys.exit(f"tutorial: {name}: {result.error.detail}")
    return answer, result


def shown(result: ClassifyItem) -> str:
    """A result in words."""
    return f"{result.verdict}, since the {result.reason}."


def correct(client: HardlookClient, photos: Mapping[str, Image.Image]) -> bool:
    """Report a wrong verdict, decide it as a reviewer, see the next answer, and go back; whether all came out right."""
    chapter("5. A wrong verdict is corrected, and the correction taken back")
    portrait = encoded(photos["astronaut"], "JPEG", quality=90)
    answer, before = judged(client, "portrait", portrait)
    say(f"The portrait of an astronaut: {shown(before)} That is wrong: our pools have never seen a person.")
    # Whoever got the answer reports it; the reviewer finds it in the queue, and claims it so that nobody else does.
    client.feedback("false-positive", request_id=answer.request_id, comment="a portrait")
    claimed = client.reviews.claim_next()
    if claimed is None:
        say("The report is not in the queue.")
        return False
    client.reviews.decide(claimed.review.id, "safe", reason="a person, not a vehicle")
    # Not the same file: other pixels, other bytes.
    other = encoded(cut(ImageOps.mirror(photos["astronaut"]), 0.05, 0.05, 0.95, 0.95))
    _, after = judged(client, "portrait, mirrored and cut", other)
    say(f"After one decision, another picture of her: {shown(after)} No network was trained and no index "
        "rebuilt; the exemplar was in the next search, and is on disk.")  # fmt: skip
    version = answer.snapshot.version
    client.versions.rollback("pools", version, reason="the tutorial goes back")
    _, back = judged(client, "portrait", portrait)
    sound = client.audit.verify().sound
    kinds = [entry.kind for entry in client.audit.entries()]
    say(f"After going back to version {version}: {back.verdict} again, with the same evidence. The audit log says what "
        f"was done ({', '.join(kinds[-3:])} at the end) and is {'sound' if sound else 'NOT SOUND'}.")  # fmt: skip
    return (before.verdict, after.verdict, back) == ("unsafe", "safe", before) and sound


# --- 6. an audit -----------------------------------------------------------------------------------------------------


def audit(encoders: Mapping[str, Encoder], photos: Mapping[str, Image.Image], work: Path, out: Path) -> None:
    """Attack both systems' verdicts on views that are not in the pools, by an attacker who knows the pools."""
    chapter("6. A tiny audit")
    say(
        "One attacked cat proves nothing. An audit attacks many images through the code that serves, by an attacker "
        "who knows encoder and pools, and counts what is right when clean *and* when attacked. This one has 12 images "
        "and 20 steps, to be over in seconds, and its pictures have little in common: the intervals say how little it "
        "shows. On the demo pools the same attacker leaves this robust encoder 27 % of the unsafe images right, at the "
        "same radius (README.md): robust is not invulnerable."
    )
    for name, pool in POOL_OF.items():
        if pool == "buffer":
            continue
        folder = work / "queries" / pool
        folder.mkdir(parents=True, exist_ok=True)
        cut(photos[name], 0.0, 0.0, 0.85, 0.85).save(folder / f"{name}-upper-left.png")
        ImageEnhance.Brightness(photos[name].rotate(8, expand=False)).enhance(0.8).save(folder / f"{name}-dark.png")
    plan = plan_from_table(
        {
            "task": "moderation",
            "attacks": ["white-box"],
            "square_queries": 0,
            "check_images": 2,
            "system": [{"name": name, "encoder": name, "gallery": gallery_name(name)} for name in encoders],
            "queries": [{"kind": "folder", "path": f"queries/{pool}", "label": pool} for pool in ("safe", "unsafe")],
            "threat": [{"norm": "linf", "eps": "4/255", "steps": 20}],
        }
    )
    for _ in run_audit(plan, data=work, folder=work, run=work / "audit"):
        pass  # each step is a batch; a killed audit goes on from the last one
    print(table(Run.read(work / "audit").figures))
    shutil.copy(write_report(work / "audit"), out / "audit.html")
    say(f"{out / 'audit.html'} is the whole report. Its checks for masked gradients are made on two images here, and "
        "may say that so few show nothing.")  # fmt: skip


def main() -> None:
    """Run all chapters; exit code 1 where something did not come out as the text says."""
    parser = argparse.ArgumentParser(description="From two photographs to an audited service.")
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial"), help="folder for pictures and the report")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="only write the photographs there, then stop")
    options = parser.parse_args()
    if options.photos is not None:
        write_photographs(photographs(), options.photos)
        return
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    photos = photographs()
    say("Loading the two small encoders that ship with the package.")
    encoders = {name: load_encoder(name) for name in (CLEAN, ROBUST)}
    look(encoders, photos)
    fooling = attack(encoders, photos, out)
    with tempfile.TemporaryDirectory(prefix="hardlook-tutorial-") as folder:
        work = Path(folder)
        make_pools(encoders, photos, work)
        with serving(work) as client:
            ask(client, photos, fooling)
            corrected = correct(client, photos)
        audit(encoders, photos, work, out)
    chapter("What next")
    say(
        "docs/quick-start.md does the same with the commands. docs/threat-model.md says what all this does not protect "
        "from, and docs/training.md how an encoder is made robust."
    )
    outcome = "everything came out as the text says" if corrected else "the correction did NOT come out as it says"
    print(f"\ntutorial: {outcome}; {time.monotonic() - began_s:.0f} s; see {out}")
    sys.exit(0 if corrected else 1)


if __name__ == "__main__":
    main()
