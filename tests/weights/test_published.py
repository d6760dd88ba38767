"""The table of published weights against timm's and torchvision's own records."""

import re
import subprocess
import sys

import pytest
import torchvision
from timm.data import ImageNetInfo
from timm.models._registry import _model_default_cfgs as timm_records

from vitrail.images.preprocess import Preprocess
from vitrail.models.catalog import VARIANTS
from vitrail.weights.labels import label_names
from vitrail.weights.published import PUBLISHED
from vitrail.weights.record import WeightsRecord

RECORDS = [record for records in PUBLISHED.values() for record in records]
OF_TIMM = [record for record in RECORDS if record.source.startswith("hf:timm/")]
OF_TORCHVISION = [record for record in RECORDS if record not in OF_TIMM]
TORCHVISION = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch16_384": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
    "vit_huge_patch14_224": "vit_h_14",
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
}


def test_every_row_of_the_catalog_that_has_weights() -> None:
    """Everything that timm publishes under a name of ours is in the table, the default first, and nothing else."""
    for name in VARIANTS:
        theirs = timm_records.get(name)  # our own small variants are not timm's
        tags = [tag for tag in theirs.tags if theirs.cfgs[tag].has_weights] if theirs else []
        assert [record.tag for record in PUBLISHED.get(name, ()) if record in OF_TIMM] == tags, name
    assert set(PUBLISHED) == {name for name in VARIANTS if name in timm_records}


@pytest.mark.parametrize("record", OF_TIMM, ids=lambda record: record.name)
def test_a_record_is_timms(record: WeightsRecord) -> None:
    theirs = timm_records[record.model].cfgs[record.tag]
    assert record.source == f"hf:{theirs.hf_hub_id}{record.model}.{record.tag}"
    assert theirs.hf_hub_filename is None
    assert record.licence == theirs.license
    assert record.num_classes == theirs.num_classes
    assert record.preprocess == Preprocess(
        size=theirs.input_size[1:],
        channels=theirs.input_size[0],
        mean=theirs.mean,
        std=theirs.std,
        interpolation=theirs.interpolation,
        crop_pct=theirs.crop_pct,
        crop_mode=theirs.crop_mode,
    )


@pytest.mark.parametrize("record", OF_TORCHVISION, ids=lambda record: record.name)
def test_a_record_is_torchvisions(record: WeightsRecord) -> None:
    name = TORCHVISION.get(record.model, record.model)
    theirs = next(w for w in torchvision.models.get_model_weights(name) if w.url == record.source)
    transform = theirs.transforms()
    assert record.sha256 == re.search(r"-([0-9a-f]{8})\.pth$", theirs.url)[1]
    assert record.top1 == theirs.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert record.num_classes == len(theirs.meta["categories"])
    assert record.licence == ("cc-by-nc-4.0" if "SWAG" in theirs.name else "bsd-3-clause")
    p = record.preprocess
    assert [p.size[0]] == transform.crop_size
    assert [int(p.size[0] / p.crop_pct)] == transform.resize_size
    assert (list(p.mean), list(p.std)) == (transform.mean, transform.std)
    assert (p.interpolation, p.crop_mode) == (transform.interpolation.value, "center")


def test_torchvisions_are_all_there() -> None:
    """Left out are two at sizes that no row of the catalog has."""
    sources = {record.source for record in RECORDS}
    names = {*TORCHVISION.values(), "resnet18", "resnet34", "resnet50", "resnet101", "convnext_tiny"}
    missing = {w.name for n in names for w in torchvision.models.get_model_weights(n) if w.url not in sources}
    assert missing == {"IMAGENET1K_SWAG_E2E_V1"}


def test_what_is_said_is_plausible() -> None:
    for record in RECORDS:
        assert record.top1 is None or 60 < record.top1 < 90
        assert record.top1 is None or record.num_classes == 1000
        assert record.paper is None or re.fullmatch(r"\d{4}\.\d{5}", record.paper)
    known = [record for record in RECORDS if record.num_classes == 1000 and record.top1 is not None]
    assert len(known) >= 70
    assert RECORDS[0].labels == "imagenet-1k"
    assert len({record.name for record in RECORDS}) == len(RECORDS)


def test_importing_the_table_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, vitrail.images.preprocess, csv, time; start = time.process_time();"
        "import vitrail.weights.published; took = time.process_time() - start;"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules), 'heavy import'; assert took < 0.05, took"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imagenets_names() -> None:
    names = label_names("imagenet-1k")
    assert names is not None
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert list(names) == theirs
    assert len(set(names)) == 1000
    info = ImageNetInfo("imagenet-1k")
    words = [set(re.findall(r"\w+", info.index_to_description(index).lower())) for index in range(1000)]
    alike = sum(bool(set(re.findall(r"\w+", name.lower())) & w) for name, w in zip(names, words, strict=True))
    assert alike > 980, "timm's rows are in the same order"
    assert label_names(None) is None
    assert label_names("imagenet-22k") is None
