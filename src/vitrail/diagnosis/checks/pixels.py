"""Sizes, brightness, sharpness and content of single images."""

import numpy as np

from vitrail.diagnosis.findings import Evidence, Finding, of_images

_SIDE_RATIO = 3.0  # of an image's side (the root of its area) to the median's, beyond which its size is odd
_CROP_LOSS = 0.5  # share of an image that a centre crop cuts off, from which on its shape is odd
_DARK = 1 / 3  # 99 % of the pixels are darker
_BRIGHT = 0.93  # 95 % of the pixels are brighter
_BITS = 3.0  # entropy of the grey histogram, of 8 at most
_BLUR = 0.6  # of the blur effect, and so much above the median:
_BLUR_ABOVE = 0.12
_GREY = 8  # levels: largest difference of two channels in an image without colour, but for rounding in its JPEG
_MOSTLY = 0.9  # share of images with colour, from which on grey ones are odd


def odd_size(evidence: Evidence) -> list[Finding]:
    """Images much smaller or larger than most, or so long that a centre crop loses half of them."""
    scan = evidence.scan
    sides = np.sqrt(scan.sizes.prod(axis=1))
    ratio = sides / np.median(sides)
    loss = crop_loss(evidence)
    odd = np.maximum(np.maximum(ratio, 1 / ratio) / _SIDE_RATIO, loss / _CROP_LOSS)
    rows = np.flatnonzero(odd > 1)
    rows = rows[np.argsort(-odd[rows], kind="stable")]
    height, width = evidence.input_size
    advice = (
        f"Sizes far from the median, or shapes of which the centre crop to {width} x {height} loses more than "
        f"{_CROP_LOSS:.0%} (all images: {np.median(loss):.0%} in the median, up to {loss.max():.0%}). fit=pad or "
        "fit=squash keeps all of an image."
    )
    notes = {int(i): f"{scan.sizes[i, 1]} x {scan.sizes[i, 0]}, the crop loses {loss[i]:.0%}" for i in rows}
    return of_images(scan, "odd_size", rows, advice, notes)


def crop_loss(evidence: Evidence) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """N: the share of each image that a centre crop of the input's shape cuts off."""
    height, width = evidence.input_size
    aspect = evidence.scan.sizes[:, 1] / evidence.scan.sizes[:, 0] * height / width
    return np.asarray(1 - np.minimum(aspect, 1 / aspect))


def dark(evidence: Evidence) -> list[Finding]:
    """Images almost without bright pixels."""
    values = evidence.scan.dark
    advice = "99 % of the pixels are darker than a third of white: perhaps nothing can be seen. Look at them."
    return _ranked(evidence, "dark", values, values < _DARK, advice, "99 % of the pixels below {:.0%} of white")


def bright(evidence: Evidence) -> list[Finding]:
    """Images almost without dark pixels."""
    values = evidence.scan.bright
    advice = "95 % of the pixels are almost white: perhaps overexposed or empty. Look at them."
    return _ranked(evidence, "bright", -values, values > _BRIGHT, advice, "95 % of the pixels above {:.0%} of white")


def blurry(evidence: Evidence) -> list[Finding]:
    """Images that one more blur hardly changes, at about the size at which a model sees them; see `blur_effect`."""
    values = evidence.scan.blur
    usual = np.nanmedian(values) if np.isfinite(values).any() else 0.0
    blurred = (values > _BLUR) & (values > usual + _BLUR_ABOVE)
    advice = "Much less sharp than the other images, even reduced. Look whether the subject can still be recognised."
    return _ranked(evidence, "blurry", -values, blurred, advice, "blur effect {:.2f} of 1")


def low_information(evidence: Evidence) -> list[Finding]:
    """Images of a few tones."""
    values = evidence.scan.entropy
    advice = f"Less than {_BITS:g} bits of grey tones: almost one colour. Look whether there is anything on them."
    return _ranked(evidence, "low_information", values, values < _BITS, advice, "{:.1f} bits of grey tones")


def grey_among_colour(evidence: Evidence) -> list[Finding]:
    """Images without colour among images with colour; they lack information that others have."""
    scan = evidence.scan
    # In dark and bright images, the channels hardly differ even where there is colour.
    visible = (scan.dark >= _DARK) & (scan.bright <= _BRIGHT)
    grey = np.where(visible, scan.chroma <= _GREY, scan.chroma == 0)
    if not visible.any() or grey[visible].mean() > 1 - _MOSTLY:
        return []
    advice = "Grey images among images with colour: a model may learn the missing colour instead of the subject."
    rows = np.flatnonzero(grey)
    return of_images(scan, "low_information", rows, advice, {int(i): "has no colour" for i in rows})


def _ranked(
    evidence: Evidence,
    check: str,
    order: "np.ndarray[tuple[int], np.dtype[np.float32]]",
    flagged: "np.ndarray[tuple[int], np.dtype[np.bool_]]",
    advice: str,
    note: str,
) -> list[Finding]:
    """The flagged images in ascending `order`."""
    rows = np.flatnonzero(flagged)
    rows = rows[np.argsort(order[rows], kind="stable")]
    notes = {int(i): note.format(abs(float(order[i]))) for i in rows}
    return of_images(evidence.scan, check, rows, advice, notes)
