"""What the Hub knows in a model card's front matter: data.

Keys: https://huggingface.co/docs/hub/model-cards, https://huggingface.co/docs/hub/models-gated, ``ModelCardData`` and
``modelcard.md`` of huggingface/hub-docs. Licences: https://huggingface.co/docs/hub/repositories-licenses. Tasks:
``pipelines.ts`` of huggingface.js (``packages/tasks``). A licence or task that is newer than these lists is no error.
"""

from __future__ import annotations

# key → what --set-metadata may give it; "nested" cannot be written on a command line
KEYS = {
    "base_model": "texts",
    "base_model_relation": "text",
    "co2_eq_emissions": "number",
    "datasets": "texts",
    "extra_gated_button_content": "text",
    "extra_gated_description": "text",
    "extra_gated_eu_disallowed": "flag",
    "extra_gated_fields": "nested",
    "extra_gated_heading": "text",
    "extra_gated_prompt": "text",
    "inference": "flag",
    "instance_prompt": "text",
    "language": "texts",
    "library_name": "text",
    "license": "text",
    "license_link": "text",
    "license_name": "text",
    "mask_token": "text",
    "metrics": "texts",
    "model-index": "nested",
    "new_version": "text",
    "pipeline_tag": "text",
    "tags": "texts",
    "thumbnail": "text",
    "widget": "nested",
}

RELATIONS = ("adapter", "finetune", "merge", "quantized")

_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())

_TASKS = """
any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition biology
depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video
image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice
object-detection other question-answering reinforcement-learning robotics sentence-similarity summarization
table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
text-to-speech text-to-video text2text-generation time-series-forecasting token-classification translation
unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
zero-shot-object-detection
"""
TASKS = frozenset(_TASKS.split())

# Tags of a source that are not true of a torchao .bin: its file formats, its quantization, and what only the Hub sets.
_FORMAT_TAGS = """
safetensors gguf ggml onnx openvino coreml mlx tensorrt tensorrt-llm tflite litert tf tensorflow keras jax flax rust
ctranslate2 executorch llamafile llama.cpp llama-cpp ollama openvino-export gguf-my-repo mlx-my-repo exl2 exl3
exllamav2 exllamav3 gptq gptqmodel awq autoawq auto-round autoround aqlm bitsandbytes bnb eetq higgs hqq quanto
optimum-quanto spqr vptq compressed-tensors llm-compressor modelopt imatrix marlin nunchaku svdquant torchao
int2 int3 int4 int8 fp4 fp6 fp8 float8 nf4 mxfp4 mxfp8 nvfp4 w4a16 w4a8 w8a8 w8a16 1-bit 2-bit 3-bit 4-bit 5-bit
6-bit 8-bit 1bit 2bit 3bit 4bit 5bit 6bit 8bit fp16 fp32 bf16
endpoints_compatible autotrain_compatible text-generation-inference text-embeddings-inference model-index
co2_eq_emissions has_space eval-results
"""
FORMAT_TAGS = frozenset(_FORMAT_TAGS.split())
