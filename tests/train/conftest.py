import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # configurations name classes of fake_lab
