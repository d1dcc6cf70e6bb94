from ijckd_fast.data.prepare.cifar import prepare_cifar as prepare_cifar
from ijckd_fast.data.prepare.digits import write_digits as write_digits
from ijckd_fast.data.prepare.glyphs import prepare_glyphs as prepare_glyphs
from ijckd_fast.data.prepare.imagenet import prepare_imagenet as prepare_imagenet
from ijckd_fast.data.prepare.pack_blocks import BlockPack as BlockPack
from ijckd_fast.data.prepare.pack_jpeg import JpegPack as JpegPack
from ijckd_fast.data.prepare.pack_report import pack_table as pack_table
from ijckd_fast.data.prepare.packing import pack as pack
from ijckd_fast.data.prepare.what_was_lost import PackLoss as PackLoss, pack_loss as pack_loss
