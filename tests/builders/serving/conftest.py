"""An engine of a tiny model with a chat template, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.export import Source, export
from smoothquant.settings import SmoothingSettings
from tests.models import hooked_absmax, open_llama, sample_ids, save_llama
from tests.writers import onnx_writer

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'assistant' and loop.first %}{{ raise_exception('a user speaks first') }}{% endif %}
[{{ message.role }}] {{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}[assistant] {% endif %}"""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's folder, of the name "engine". Read only."""
    root = tmp_path_factory.mktemp("served")
    model = save_llama(root / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    source = Source(open_llama(model), SmoothingSettings(), hooked_absmax(model, sample_ids()), {"model": "m"})
    export(source, [onnx_writer(root / "engine")])
    return root / "engine"
