"""Weights of a model for the same model at other sizes of images and captions.

Position embeddings are interpolated in `towers.py` and `hugging_face.py`, and images resized in
`data/transforms.py`.
"""

from protoclip.models import hugging_face, towers
from protoclip.models.hugging_face import HuggingFaceTowers
from protoclip.models.opening import misfits
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.towers import examples_of


def adopt(built: ProtoCLIP, source: TowerPair, *, name: str) -> list[str]:
    """Load the weights of `source` in place, and interpolate its position embeddings if need be.

    The heads stay new if `source` has none. `source` cannot be used afterwards.

    Returns:
        A note on each modality whose position embeddings were interpolated.

    Raises:
        ValueError: `source` is of another architecture.
    """
    expected, given = built.state_dict(), source.state_dict()
    changed = {
        key for key in given.keys() & expected.keys() if given[key].shape != expected[key].shape
    }
    size, size_before = (towers.image_size(pair.towers) for pair in (built, source))
    if size != size_before:
        trunk = getattr(source.towers.visual, "trunk", None)
        if trunk is not None:
            towers.set_input_size(trunk, size, name)
    weights = source.towers.state_dict()
    if isinstance(built.towers, HuggingFaceTowers):
        hugging_face.interpolate(weights, built.towers)
    else:
        towers.interpolate(weights, built.towers)
    whole = {**source.state_dict(), **{f"towers.{key}": value for key, value in weights.items()}}
    if not isinstance(source, ProtoCLIP):
        whole |= {key: value for key, value in expected.items() if not key.startswith("towers.")}
    if wrong := misfits(built, whole):
        raise ValueError(f"{name}: does not fit the [model] section: {examples_of(wrong)}")
    built.load_state_dict(whole)
    notes = []
    if any(key.startswith("towers.visual.") for key in changed):
        notes.append(
            f"model.image.size: position embeddings of {name} interpolated, from {size_before} to "
            f"{size} pixels"
        )
    if texts := [key for key in changed if not key.startswith("towers.visual.")]:
        length, length_before = len(expected[texts[0]]), len(given[texts[0]])
        notes.append(
            f"model.text.context_length: position embeddings of {name} interpolated, from "
            f"{length_before} to {length} tokens"
        )
    return notes
