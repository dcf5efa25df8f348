"""Run a whole distillation under any launcher: argv -> config -> pipeline.

deepspeed [launcher flags] launcher/train.py --config FILE [section.key=value ...]
python | torchrun | mpirun -np N python | srun python   launcher/train.py --config FILE ...
"""

import sys

from pkd_dist.cli.launch import leave, train

if __name__ == "__main__":
    leave(train(sys.argv[1:]))
