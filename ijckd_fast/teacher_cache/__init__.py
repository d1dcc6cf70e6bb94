"""A folder that stands in for a teacher's backbone: its pooled features of V planned views of every training image.

`CacheWriter` fills the folder, `TeacherCache` reads it for training, and `format` says what lies in it.
"""

from ijckd_fast.teacher_cache.format import AGAIN, VAL, Layout, plan_settings, val_key
from ijckd_fast.teacher_cache.reader import TeacherCache
from ijckd_fast.teacher_cache.writer import CacheWriter, refuse_other_folder

__all__ = [
    "AGAIN",
    "VAL",
    "CacheWriter",
    "Layout",
    "TeacherCache",
    "plan_settings",
    "refuse_other_folder",
    "val_key",
]
