"""The web folder: a classifier for browsers, as a page of its own and for transformers.js.

index.html, *.css, *.js, model.json, ort/     a page: drop an image, get the labels; nothing is sent anywhere
config.json, preprocessor_config.json, onnx/        for transformers.js
README.md
"""

import json
from importlib.resources import files
from pathlib import Path

from vitrail.classifier import Classifier
from vitrail.deploy.web.configs import model_config, processor_config
from vitrail.deploy.web.graphs import FOLDER, write_graphs
from vitrail.deploy.web.runtime_files import MODULE, copy_runtime
from vitrail.reports.browser import SCRIPT, STYLE, shared_file

_PAGE = ("index.html", "page.js")


def is_web_folder(path: Path) -> bool:
    """Whether a folder was written by `write_web`."""
    return all((path / name).exists() for name in (*_PAGE, "model.json", FOLDER))


def write_web(classifier: Classifier, export: Path, folder: Path, name: str) -> None:
    """Write the web folder to `folder`, which must exist, from an ONNX export of the classifier. name: of the model.

    Raises:
        DownloadError: onnxruntime-web is not in the cache and could not be downloaded.
    """
    preprocess, names = classifier.preprocess, classifier.class_names
    write_graphs(export, preprocess, folder)
    (folder / "ort").mkdir()
    copy_runtime(folder / "ort")
    for page in _PAGE:
        (folder / page).write_bytes((files("vitrail.deploy.web") / "page" / page).read_bytes())
    for shared in (STYLE, SCRIPT):
        (folder / shared).write_bytes(shared_file(shared))
    described = {
        "name": name,
        "architecture": classifier.architecture,
        "class_names": list(names),
        "channels": preprocess.channels,
        "runtime": f"./ort/{MODULE}",
    }
    for file, content in (
        ("model.json", described),
        ("config.json", model_config(classifier.model.config, names, preprocess)),
        ("preprocessor_config.json", processor_config(preprocess)),
    ):
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(name, classifier), encoding="utf-8")


def _readme(name: str, classifier: Classifier) -> str:
    height, width = classifier.preprocess.size
    return f"""# {name}

{classifier.architecture}, {len(classifier.class_names)} classes, {height}x{width} pixels, for browsers.

## The page

Any web server shows it, for example `python -m http.server` in this folder. The images stay in the browser, and nothing
is requested from elsewhere.

## transformers.js

```js
import {{ env, pipeline }} from "@huggingface/transformers";

env.localModelPath = "/models"; // the folder above this one
env.allowRemoteModels = false;
const classify = await pipeline("image-classification", "{name}", {{ dtype: "fp32" }});
console.log(await classify("photo.jpg"));
```

transformers.js resizes images with other arithmetic than Pillow: near a decision its answer may differ from that of the
page, which is vitrail's.
"""
