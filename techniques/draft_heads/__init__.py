"""Draft heads: small modules trained on a target's hidden states that guess its next tokens.

Their shapes and published layouts, reading and writing them, and training them on text that the
target wrote itself. What proposes with them at run time are techniques of their own.
"""

from techniques.draft_heads.eagle import EagleModule
from techniques.draft_heads.files import HEAD_FILE, check_target, load_head, save_head
from techniques.draft_heads.medusa import MedusaHead
from techniques.draft_heads.shipped import shipped_head, targets_of_shipped
from techniques.draft_heads.spec import KINDS, HeadSpec, eagle3_layers
from techniques.draft_heads.target import Target

__all__ = [
    "HEAD_FILE",
    "KINDS",
    "EagleModule",
    "HeadSpec",
    "MedusaHead",
    "Target",
    "check_target",
    "eagle3_layers",
    "load_head",
    "save_head",
    "shipped_head",
    "targets_of_shipped",
]
