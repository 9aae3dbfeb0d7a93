"""Names that torchao 0.4 to 0.17 put into checkpoints and torchao 0.18 no longer registers as safe.

They can be read and shown, not loaded: module paths moved in almost every version and the classes are gone or renamed.
Taken from the class statements of the released wheels 0.4.0, 0.5.0, 0.6.1, 0.7.0, 0.8.0 up to 0.13.0, 0.14.1 and
0.15.0 to 0.17.0, ``Cls.__module__ = ...`` applied; training, optimizer and observer classes left out.
Each table is ``{module: names}``.
"""

from collections.abc import Mapping

LEGACY_TENSORS: Mapping[str, str] = {
    "torchao.dtypes.affine_quantized_tensor": (
        "AffineQuantizedTensor BlockSparseAQTLayout Float8AQTLayout MarlinQQQTensor MarlinSparseAQTLayout "
        "PlainAQTLayout SemiSparseAQTLayout TensorCoreTiledAQTLayout"
    ),
    "torchao.dtypes.fbgemm_fp8_tensor": "FbgemmFp8Tensor",
    "torchao.dtypes.fbgemm_int4_tensor": "FbgemmInt4Tensor",
    "torchao.dtypes.floatx.cutlass_semi_sparse_layout": "CutlassSemiSparseTensorImpl",
    "torchao.dtypes.floatx.float8_layout": "Float8AQTTensorImpl",
    "torchao.dtypes.floatx.floatx": "FloatxTensorCoreAQTLayout",
    "torchao.dtypes.floatx.floatx_tensor_core_layout": "FloatxTensorCoreAQTTensorImpl",
    "torchao.dtypes.fpx.fpx": "FpxTensorCoreAQTLayout",
    "torchao.dtypes.nf4tensor": "NF4Tensor",
    "torchao.dtypes.uint4": "PerChannelSymmetricWeightUInt4Tensor UInt4Tensor",
    "torchao.dtypes.uintx.Uintx": "UintxAQTLayout UintxTensor",
    "torchao.dtypes.uintx.block_sparse_layout": "BlockSparseAQTTensorImpl",
    "torchao.dtypes.uintx.cutlass_int4_packed_layout": "Int4PackedTensorImpl",
    "torchao.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout": "DA8W4CPUAQTTensorImpl",
    "torchao.dtypes.uintx.gemlite_layout": "GemliteAQTTensorImpl",
    "torchao.dtypes.uintx.int4_cpu_layout": "Int4CPUAQTTensorImpl",
    "torchao.dtypes.uintx.int4_xpu_layout": "Int4XPUAQTTensorImpl",
    "torchao.dtypes.uintx.marlin_qqq_layout": "MarlinQQQAQTTensorImpl",
    "torchao.dtypes.uintx.marlin_qqq_tensor": "MarlinQQQAQTTensorImpl MarlinQQQTensor",
    "torchao.dtypes.uintx.marlin_sparse_layout": "MarlinSparseAQTTensorImpl",
    "torchao.dtypes.uintx.packed_linear_int8_dynamic_activation_intx_weight_layout": (
        "PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl _AffineQuantizedTensor"
    ),
    "torchao.dtypes.uintx.plain_layout": "PlainAQTTensorImpl",
    "torchao.dtypes.uintx.q_dq_layout": "QDQTensorImpl _Impl",
    "torchao.dtypes.uintx.semi_sparse_layout": "SemiSparseAQTTensorImpl",
    "torchao.dtypes.uintx.tensor_core_tiled_layout": "Int4CPUAQTTensorImpl TensorCoreTiledAQTTensorImpl",
    "torchao.dtypes.uintx.uint4_layout": "PerChannelSymmetricWeightUInt4Tensor UInt4Tensor",
    "torchao.dtypes.uintx.uintx": "UintxAQTLayout UintxTensor",
    "torchao.dtypes.uintx.uintx_layout": "UintxAQTTensorImpl UintxTensor",
    "torchao.experimental._linear_8bit_act_xbit_weight_layout": "Linear8BitActXBitWeightAQTTensorImpl",
    "torchao.experimental.packed_linear_int8_dynamic_activation_intx_weight_layout": (
        "PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl PackedLinearInt8DynamicActivationIntxWeightAtenTensor"
    ),
    "torchao.experimental.q_dq_layout": "_Impl",
    "torchao.float8.float8_tensor": "Float8Tensor",
    "torchao.prototype.dtypes.floatx.floatx_tensor_core_layout": "FloatxTensorCoreAQTTensorImpl",
    "torchao.prototype.dtypes.uint2": "UInt2Tensor",
    "torchao.prototype.dtypes.uintx.block_sparse_layout": "BlockSparseAQTTensorImpl",
    "torchao.prototype.dtypes.uintx.cutlass_int4_packed_layout": "Int4PackedTensorImpl",
    "torchao.prototype.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout": "DA8W4CPUAQTTensorImpl",
    "torchao.prototype.dtypes.uintx.gemlite_layout": "GemliteAQTTensorImpl",
    "torchao.prototype.dtypes.uintx.marlin_qqq_tensor": "MarlinQQQAQTTensorImpl MarlinQQQTensor",
    "torchao.prototype.dtypes.uintx.uintx_layout": "UintxAQTTensorImpl UintxTensor",
    "torchao.prototype.dtypes.uintx.uintx_utils": "UintxAQTTensorImpl UintxTensor",
    "torchao.prototype.int4_opaque_tensor": "Int4OpaqueTensor",
    "torchao.prototype.quantization.autoquant_v2": (
        "AQBFloat16LinearWeight AQDefaultLinearWeight AQFloat16LinearWeight AQFloat32LinearWeight "
        "AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight "
        "AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight AQFloat8WeightOnlyQuantizedLinearWeight "
        "AQFloatLinearWeight AQInt4G128WeightOnlyQuantizedLinearWeight AQInt4G256WeightOnlyQuantizedLinearWeight "
        "AQInt4G32WeightOnlyQuantizedLinearWeight AQInt4G64WeightOnlyQuantizedLinearWeight "
        "AQInt8DynamicallyQuantizedLinearWeight AQInt8WeightOnlyQuantizedLinearWeight "
        "AQInt8WeightOnlyQuantizedLinearWeight2 AQInt8WeightOnlyQuantizedLinearWeight3 BFloat16Tensor "
        "Float16Tensor Float32Tensor"
    ),
    "torchao.prototype.quantization.codebook.codebook_quantized_tensor": "CodebookQuantizedTensor",
    "torchao.prototype.quantization.codebook_coreml.codebook_quantized_tensor": "CodebookQuantizedTensor",
    "torchao.prototype.quantization.codebook_groupwise.codebook_quantized_tensor": "CodebookQuantizedPackedTensor",
    "torchao.prototype.quantization.dynamic_activation_lut.int8_dynamic_activation_lut_tensor": (
        "Int8DynamicActivationLutTensor"
    ),
    "torchao.quantization": "Int4MarlinSparseTensor Int4OpaqueTensor IntxUnpackedTensor PrototypeFloat8Tensor",
    "torchao.quantization.autoquant": (
        "AQBFloat16LinearWeight AQDefaultLinearWeight AQFloat16LinearWeight AQFloat32LinearWeight "
        "AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight "
        "AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight AQFloat8WeightOnlyQuantizedLinearWeight "
        "AQFloatLinearWeight AQGemliteInt4G128WeightOnlyQuantizedLinearWeight "
        "AQGemliteInt4G256WeightOnlyQuantizedLinearWeight AQGemliteInt4G32WeightOnlyQuantizedLinearWeight "
        "AQGemliteInt4G64WeightOnlyQuantizedLinearWeight AQInt4G128WeightOnlyQuantizedLinearWeight "
        "AQInt4G128WeightOnlyQuantizedMarlinSparseLinearWeight AQInt4G256WeightOnlyQuantizedLinearWeight "
        "AQInt4G32WeightOnlyQuantizedLinearWeight AQInt4G64WeightOnlyQuantizedLinearWeight "
        "AQInt8DynamicallyQuantizedLinearWeight AQInt8DynamicallyQuantizedSemiSparseLinearWeight "
        "AQInt8WeightOnlyQuantizedLinearWeight AQInt8WeightOnlyQuantizedLinearWeight2 "
        "AQInt8WeightOnlyQuantizedLinearWeight3 AQWeightOnlyQuantizedLinearWeight "
        "AQWeightOnlyQuantizedLinearWeight2 AQWeightOnlyQuantizedLinearWeight3 BFloat16Tensor Float16Tensor "
        "Float32Tensor"
    ),
    "torchao.quantization.linear_activation_quantized_tensor": "LinearActivationQuantizedTensor",
    "torchao.quantization.linear_activation_scale": "WeightTensorWithLinearActivationScaleMetadata",
    "torchao.quantization.quantize_.int4_groupwise_preshuffle_tensor": "Int4GroupwisePreshuffleTensor",
    "torchao.quantization.quantize_.workflows.float8.sparse_2x4_cutlass_float8_tensor": (
        "Sparse2x4CUTLASSFloat8Tensor"
    ),
    "torchao.quantization.subclass": (
        "Int4WeightOnlyQuantizedLinearWeight Int8DynamicallyQuantizedLinearWeight Int8WeightOnlyQuantizedLinearWeight"
    ),
    "torchao.quantization.weight_tensor_linear_activation_quantization": (
        "WeightTensorWithLinearActivationQuantizationMetadata"
    ),
}
"""Tensor subclasses."""

LEGACY_DATA: Mapping[str, str] = {
    "torchao.dtypes.affine_quantized_tensor": (
        "BlockSparseLayoutType Float8LayoutType MarlinSparseLayoutType SemiSparseLayoutType TensorCoreTiledLayoutType"
    ),
    "torchao.dtypes.floatx.cutlass_semi_sparse_layout": "CutlassSemiSparseLayout",
    "torchao.dtypes.floatx.float8_layout": "Float8Layout",
    "torchao.dtypes.floatx.floatx": "FloatxTensorCoreLayoutType",
    "torchao.dtypes.floatx.floatx_tensor_core_layout": "FloatxTensorCoreLayout",
    "torchao.dtypes.fpx.fpx": "FpxTensorCoreLayoutType",
    "torchao.dtypes.uintx.Uintx": "UintxLayoutType",
    "torchao.dtypes.uintx.block_sparse_layout": "BlockSparseLayout",
    "torchao.dtypes.uintx.cutlass_int4_packed_layout": "CutlassInt4PackedLayout",
    "torchao.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout": "Int8DynamicActInt4WeightCPULayout",
    "torchao.dtypes.uintx.gemlite_layout": "GemlitePackedLayout",
    "torchao.dtypes.uintx.int4_cpu_layout": "Int4CPULayout",
    "torchao.dtypes.uintx.int4_xpu_layout": "Int4XPULayout",
    "torchao.dtypes.uintx.marlin_qqq_layout": "MarlinQQQLayout",
    "torchao.dtypes.uintx.marlin_qqq_tensor": "MarlinQQQLayout",
    "torchao.dtypes.uintx.marlin_sparse_layout": "MarlinSparseLayout",
    "torchao.dtypes.uintx.packed_linear_int8_dynamic_activation_intx_weight_layout": (
        "PackedLinearInt8DynamicActivationIntxWeightLayout"
    ),
    "torchao.dtypes.uintx.q_dq_layout": "QDQLayout",
    "torchao.dtypes.uintx.semi_sparse_layout": "SemiSparseLayout",
    "torchao.dtypes.uintx.tensor_core_tiled_layout": "Int4CPULayout TensorCoreTiledLayout",
    "torchao.dtypes.uintx.uintx": "UintxLayoutType",
    "torchao.dtypes.uintx.uintx_layout": "UintxLayout",
    "torchao.dtypes.utils": "PlainLayout PlainLayoutType",
    "torchao.experimental._linear_8bit_act_xbit_weight_layout": "Linear8BitActXBitWeightLayout",
    "torchao.experimental.packed_linear_int8_dynamic_activation_intx_weight_layout": (
        "PackedLinearInt8DynamicActivationIntxWeightLayout"
    ),
    "torchao.experimental.q_dq_layout": "QDQLayout",
    "torchao.prototype.dtypes.floatx.floatx_tensor_core_layout": "FloatxTensorCoreLayout",
    "torchao.prototype.dtypes.uintx.block_sparse_layout": "BlockSparseLayout",
    "torchao.prototype.dtypes.uintx.cutlass_int4_packed_layout": "CutlassInt4PackedLayout",
    "torchao.prototype.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout": "Int8DynamicActInt4WeightCPULayout",
    "torchao.prototype.dtypes.uintx.gemlite_layout": "GemlitePackedLayout",
    "torchao.prototype.dtypes.uintx.marlin_qqq_tensor": "MarlinQQQLayout",
    "torchao.prototype.dtypes.uintx.uintx_layout": "UintxLayout",
    "torchao.prototype.dtypes.uintx.uintx_utils": "UintxLayout",
    "torchao.quantization.granularity": "PerAxis PerGroup PerToken",
    "torchao.quantization.observer": "PerAxis PerGroup PerRow PerTensor",
}
"""Layouts, granularities and activation settings: objects made without arguments, then given attributes."""

LEGACY_ENUMS: Mapping[str, str] = {
    "torchao.dtypes.uintx.packed_linear_int8_dynamic_activation_intx_weight_layout": "Target",
    "torchao.experimental._linear_8bit_act_xbit_weight_layout": "Target",
    "torchao.experimental.packed_linear_int8_dynamic_activation_intx_weight_layout": "Target",
    "torchao.float8.float8_tensor": "GemmInputRole",
    "torchao.float8.inference": "ActivationCasting",
    "torchao.prototype.mx_formats.mx_tensor": "ScaleCalculationMode",
    "torchao.prototype.mx_formats.nvfp4_tensor": "NVFP4MMConfig",
    "torchao.quantization.quant_primitives": "TorchAODType",
    "torchao.quantization.quantize_.common.packing_format": "PackingFormat",
    "torchao.quantization.quantize_.common.quantization_step": "QuantizationStep",
    "torchao.quantization.quantize_.workflows.int4.int4_choose_qparams_algorithm": "Int4ChooseQParamsAlgorithm",
    "torchao.quantization.quantize_.workflows.int4.int4_packing_format": "Int4PackingFormat",
    "torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm": "IntxChooseQParamsAlgorithm",
}
"""Enums, pickled by value."""

LEGACY_TUPLES: Mapping[str, str] = {
    "torchao.float8.float8_tensor": "LinearMMConfig ScaledMMConfig",
}
"""Named tuples."""

LEGACY_FUNCTIONS: Mapping[str, str] = {
    "torchao.quantization.quant_api": (
        "_float8_cutlass_quant _input_activation_quant_func_fp8 _input_quant_func_dyanmic_fp8 "
        "_int4_symm_cutlass_quant _int8_asymm_per_token_quant _int8_symm_cutlass_quant _int8_symm_per_token_quant "
        "_int8_symm_per_token_reduced_range_quant _int8_symm_per_token_reduced_range_quant_cutlass "
        "_int8_symm_per_token_reduced_range_quant_noop_decode _uint8_asymm_per_token_quant"
    ),
}
"""Functions that quantize activations, pickled as attributes of a tensor; never called here."""
