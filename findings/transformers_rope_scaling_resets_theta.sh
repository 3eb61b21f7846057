#!/usr/bin/env bash
# transformers 5.23.0: GLM-4's model cards tell users to add a "rope_scaling" line (YaRN) to config.json for longer texts. In a config
# that transformers 5 saved itself, theta lives in "rope_parameters"; the added line replaces that object as a whole, and theta, which
# stood only there, falls back to 10000 without a warning: 5e6 of GLM-4-9B-Chat becomes 1e4. Short prompts still read well; every
# position is rotated wrongly. In a config of transformers 4, where rope_theta stands alone, the same line keeps theta.
# One would expect YaRN on top of the theta that the file states. Seen: 5000000.0, then 10000.0 with the line; 5000000.0 in the old form.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PY'
import json
import sys

from transformers import AutoConfig, GlmConfig

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
GlmConfig(rope_parameters=rope, max_position_embeddings=32768).save_pretrained(sys.argv[1])
path = f"{sys.argv[1]}/config.json"
with open(path) as file:
    saved = json.load(file)


def theta(**changes):
    with open(path, "w") as file:
        json.dump({**saved, **changes}, file)
    parameters = AutoConfig.from_pretrained(sys.argv[1]).rope_parameters
    return parameters["rope_type"], parameters["rope_theta"]


as_saved = theta()
with_line = theta(rope_scaling=YARN)
del saved["rope_parameters"]
old_form = theta(rope_scaling=YARN, rope_theta=5e6)
print("saved by transformers 5:", *as_saved)
print("with the line of the model card:", *with_line)
print("the same line in the form of transformers 4:", *old_form)
expected = (("default", 5e6), ("yarn", 1e4), ("yarn", 5e6))
sys.exit(0 if (as_saved, with_line, old_form) == expected else 1)
PY
