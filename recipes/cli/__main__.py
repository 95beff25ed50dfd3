"""python -m recipes.cli"""

import sys

from recipes.cli import main

sys.exit(main())
