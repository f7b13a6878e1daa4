"""Where the states that a program learns from come from, as arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import PreTrainedModel

from ..data import ImageViews, load_images
from ..runs.processes import process_state
from ..teachers import load_processor
from .online import Activations, OnlineActivations, choose_images
from .store import load_activations


@dataclass(kw_only=True)
class ImageArguments:
    """Which images a teacher looks at, in which views, and how it computes."""

    dataset: str | None = field(
        default=None, metadata={"help": "digits, an image folder or a Hub id"}
    )
    split: str = "train"
    num_images: int | None = field(
        default=None, metadata={"help": "so many images, chosen at random; default: all"}
    )
    views: int = field(
        default=1, metadata={"help": "views per image; all but the first are augmented"}
    )
    view_seed: int = field(
        default=0, metadata={"help": "seed of the augmented views and of what is chosen at random"}
    )
    precision: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "what the teacher computes in; bfloat16 is for GPUs"}
    )

    def image_views(
        self, teacher: str, revision: str | None = None, *, views: int | None = None
    ) -> ImageViews:
        """The images in their views, as the teacher's own processor makes them."""
        dataset = load_images(self.dataset, self.split)
        return ImageViews(
            dataset,
            load_processor(teacher, revision),
            views=self.views if views is None else views,
            seed=self.view_seed,
            image_ids=choose_images(len(dataset), self.num_images, self.view_seed),
        )


@dataclass(kw_only=True)
class ActivationArguments(ImageArguments):
    """Whose states are learned, and whether they are stored or computed in training."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    activations: str = field(
        metadata={"help": "folder of its activation dataset, or online: computed from --dataset"}
    )
    views: int = field(
        default=1,
        metadata={"help": "online: views per image; 0: another random view in every epoch"},
    )

    @property
    def online(self) -> bool:
        """Whether the teacher computes its states while others learn from them."""
        return self.activations == "online"

    @property
    def new_views(self) -> bool:
        """Whether every epoch sees other views (`loop.fit`)."""
        return self.online and self.views == 0

    def check_source(self) -> None:
        """Refuse online without a dataset, and options of online for what is stored."""
        if self.online and self.dataset is None:
            raise ValueError("--activations online needs images: give --dataset.")
        for option in [] if self.online else fields(ImageArguments):
            if getattr(self, option.name) != getattr(type(self), option.name):
                raise ValueError(
                    f"--{option.name} is for --activations online; what {self.activations} holds "
                    "was decided when it was extracted. Leave it out."
                )

    def open(self, teacher: PreTrainedModel, layers: Sequence[int]) -> "Activations":
        """The source of these layers' states.

        Raises:
            ValueError: options that contradict each other (`check_source`), or a store that has not
                all tokens, not these layers, or is another teacher's.
        """
        self.check_source()
        if self.online:
            images = self.image_views(self.teacher, self.revision, views=max(1, self.views))
            teacher.to(process_state().device)
            return OnlineActivations(teacher, images, layers=layers, precision=self.precision)
        stored = load_activations(self.activations, layers=layers, teacher=teacher)
        if stored.manifest["num_patches"] is not None:
            raise ValueError(
                f"{self.activations} holds {stored.manifest['num_patches']} patches of each image. "
                "Blocks attend to all tokens and can't learn from some: extract without --tokens."
            )
        return stored
