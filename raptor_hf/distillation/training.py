"""The training of chains of blocks that both programs and the benchmark of recipes run."""

from pathlib import Path

from transformers import PreTrainedModel

from ..activations.online import Activations
from ..data.arguments import ReadingArguments
from ..loop.arguments import LoopArguments
from ..loop.fit import Validation, fit
from ..modeling_raptor import rotary_angles
from ..runs.files import read_json, write_json
from ..runs.processes import process_state
from .arguments import ObjectiveArguments, ValidationArguments
from .blocks import Chain
from .fidelity import make_validation
from .matching import TrajectoryMatching, matching_loss
from .objective import state_variances


def train_chains(
    chains: list[Chain],
    teacher: PreTrainedModel,
    activations: Activations,
    objective: ObjectiveArguments,
    loop: LoopArguments,
    *,
    validation: ValidationArguments | None = None,
    reading: ReadingArguments | None = None,
    revision: str | None = None,
    groups: list[dict] | None = None,
    new_views: bool = False,
) -> None:
    """Train the blocks of chains in place, so that they follow the teacher's states.

    Args:
        activations: a source of the states of all layers that the chains cover.
        validation: on what, and how often, to validate; default: never.
        reading: how the images of the validation are read.
        revision: of the teacher on the Hub, for its image processor.
        groups, new_views: as for `fit`, whose errors are raised.
    """
    validation = validation or ValidationArguments()
    variances = None if objective.normalize == "none" else _variances(activations, loop.output_dir)
    angles = rotary_angles(teacher, tuple(activations.resolution))
    token_groups = activations.layout.groups()
    module = TrajectoryMatching(chains, objective, token_groups, variances, angles)
    measure = make_validation(
        validation,
        teacher,
        chains,
        reading=reading,
        revision=revision,
        num_workers=loop.num_workers,
    )
    fit(
        module,
        activations,
        matching_loss(activations),
        loop,
        groups=groups,
        kind=module.kind,
        new_views=new_views,
        validation=measure and Validation(measure, validation.validate_every),
    )


def _variances(activations: Activations, output_dir: str) -> dict[str, list[float]]:
    """Return the variances of the states, measured once a run: `state_variances.json`."""
    path, state = Path(output_dir) / "state_variances.json", process_state()
    state.wait_for_everyone()  # all see the file, or none
    if path.exists():
        return read_json(path)["variances"]
    variances = state_variances(activations)
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"layers": activations.layers, "variances": variances})
    return variances
