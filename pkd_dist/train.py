"""Run a whole distillation under any launcher, without a checkout; the same as `launcher/train.py`.

deepspeed --module pkd_dist.train --config FILE [section.key=value ...]
torchrun -m pkd_dist.train --config FILE ...
python -m pkd_dist.train --config FILE ...
"""

import sys

from pkd_dist.cli.launch import leave, train

if __name__ == "__main__":
    leave(train(sys.argv[1:], "python -m pkd_dist.train"))
