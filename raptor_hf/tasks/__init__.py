"""The tasks that backbones are judged by: classification, segmentation, depth."""

from .heads import arrange_head, attach_head, load_linear_head
from .task import TASKS, Task

__all__ = ["TASKS", "Task", "arrange_head", "attach_head", "load_linear_head"]
