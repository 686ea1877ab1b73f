"""Which tasks a data set can serve, and what it lacks for the others."""

from protoclip.evaluation.datasets import EvaluationData

# Tasks that are cheap enough to be done often: they encode no training images and fit nothing.
QUICK = ("zero_shot", "retrieval")


def quick_tasks(data: EvaluationData, split: str) -> list[str]:
    """The tasks of `QUICK` that the data can serve; raises `ValueError` if they can serve none."""
    reasons = {task: lacks(data, split, task) for task in QUICK}
    if all(reasons.values()):
        why = "; ".join(f"{task} needs {reason}" for task, reason in reasons.items())
        raise ValueError(f"{data.name}: can serve no quick task ({why})")
    return [task for task in QUICK if not reasons[task]]


def lacks(data: EvaluationData, split: str, task: str) -> str:
    """What a task needs and the data do not have; empty if they have everything.

    Raises:
        ValueError: A label is not the number of a class.
    """
    part = data.splits[split]
    labels = part.labels
    if task in ("retrieval", "geometry"):
        for row, captions in enumerate(part.captions or ()):
            if not captions:
                raise ValueError(
                    f"{data.name}: sample '{part.images.sample_id(row)}' has no caption"
                )
        return "" if part.captions is not None else "captions"
    if task == "zero_shot" and split in data.image_names:
        return ""
    if labels is None:
        return "labels"
    if task == "zero_shot":
        check_labels(data, split)
        return "" if data.class_names else "class names"
    if labels.ndim == 2:
        return "one class an image, and these are multilabel data"
    if task == "clustering":
        return "" if len(set(labels.tolist())) > 1 else "images of two classes or more"
    train = data.splits.get("train")  # opens it, which may take long
    if train is None or train.labels is None or split == "train":
        return "a labelled train split beside the one that is measured"
    return "" if len(set(train.labels.tolist())) > 1 else "a train split of two classes or more"


def check_labels(data: EvaluationData, split: str) -> None:
    labels, count = data.splits[split].labels, len(data.class_names)
    if labels is None or not count:
        return
    if labels.ndim == 2 and labels.shape[1] != count:
        raise ValueError(
            f"{data.name}: {count} class names for {labels.shape[1]} columns of labels"
        )
    if labels.ndim == 1 and bool((wrong := (labels < 0) | (labels >= count)).any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{data.name}: sample '{data.splits[split].images.sample_id(row)}' has class "
            f"{int(labels[row])}, but there are names for classes 0 to {count - 1}"
        )
