"""The files of onnxruntime-web, which run the model in a browser. They are downloaded once, and verified."""

import tarfile
from pathlib import Path

from vitrail.errors import ExportError
from vitrail.utils.download import cache_dir, fetch

VERSION = "1.30.0"
_URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
MODULE = "ort.wasm.min.mjs"
FILES = (MODULE, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def copy_runtime(folder: Path) -> None:
    """Write FILES (14 MB) and the licence to `folder`, which must exist.

    Raises:
        DownloadError: the archive (33 MB) is not in the cache and could not be downloaded.
        ExportError: the archive has not the expected files.
    """
    archive = fetch(_URL, cache_dir() / "web" / f"onnxruntime-web-{VERSION}.tgz", sha256=_SHA256)
    with tarfile.open(archive) as tar:
        for name in FILES:
            try:
                file = tar.extractfile(f"package/dist/{name}")
            except KeyError:
                file = None
            if file is None:
                raise ExportError(f"{archive} has no {name}: delete it and try again")
            (folder / name).write_bytes(file.read())
    (folder / "LICENSE.txt").write_text(_LICENSE, encoding="utf-8")


_LICENSE = f"""onnxruntime-web {VERSION}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
