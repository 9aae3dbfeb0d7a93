"""Where a name was in which torchao release: data for ``compat``.

Measured by importing the released wheels named in ``RELEASES`` (the last patch release of each minor) under torch 2.13,
one process each, two modules that torch has since moved put back: every torchao name that a checkpoint's pickle may
hold (``formats.torch_bin.safe_names``) was looked up in its module. A line of ``TABLE`` without indent is a module; an
indented one is ``present written registered imported names``, four ranges ``first:last`` (both included, ``-``: never):

- present: the name can be looked up in the module;
- written: what is found there calls itself ``module.name``, so that release can have written it so;
- registered: ``import torchao.quantization`` gives it to ``torch.serialization.add_safe_globals``;
- imported: importing ``module`` does.
"""

RELEASES = (
    "0.4.0",
    "0.5.0",
    "0.6.1",
    "0.7.0",
    "0.8.0",
    "0.9.0",
    "0.10.0",
    "0.11.0",
    "0.12.0",
    "0.13.0",
    "0.14.1",
    "0.15.0",
    "0.16.0",
    "0.17.0",
    "0.18.0",
)

TABLE = """
torchao.dtypes.affine_quantized_tensor
  0.4.0:0.17.0 0.4.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 AffineQuantizedTensor
  0.4.0:0.6.1 0.4.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 PlainAQTLayout SemiSparseAQTLayout SemiSparseLayoutType
  0.4.0:0.6.1 0.4.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 TensorCoreTiledAQTLayout TensorCoreTiledLayoutType
  0.5.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 Float8AQTLayout Float8LayoutType MarlinSparseAQTLayout
  0.5.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 MarlinSparseLayoutType
  0.6.1:0.6.1 0.6.1:0.6.1 0.6.1:0.6.1 0.6.1:0.6.1 BlockSparseAQTLayout BlockSparseLayoutType
  0.7.0:0.7.0 0.7.0:0.7.0 - - MarlinQQQTensor
torchao.dtypes.fbgemm_fp8_tensor
  0.12.0:0.13.0 0.12.0:0.13.0 0.12.0:0.13.0 0.12.0:0.13.0 FbgemmFp8Tensor
torchao.dtypes.fbgemm_int4_tensor
  0.12.0:0.12.0 0.12.0:0.12.0 0.12.0:0.12.0 0.12.0:0.12.0 FbgemmInt4Tensor
torchao.dtypes.floatx.cutlass_semi_sparse_layout
  0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 CutlassSemiSparseLayout CutlassSemiSparseTensorImpl
torchao.dtypes.floatx.float8_layout
  0.7.0:0.16.0 0.7.0:0.16.0 0.7.0:0.16.0 0.7.0:0.16.0 Float8AQTTensorImpl Float8Layout
torchao.dtypes.floatx.floatx
  0.6.1:0.6.1 0.6.1:0.6.1 - 0.6.1:0.6.1 FloatxTensorCoreAQTLayout FloatxTensorCoreLayoutType
torchao.dtypes.floatx.floatx_tensor_core_layout
  0.7.0:0.15.0 0.7.0:0.14.1 0.7.0:0.14.1 0.7.0:0.14.1 FloatxTensorCoreAQTTensorImpl FloatxTensorCoreLayout
torchao.dtypes.fpx.fpx
  0.5.0:0.5.0 0.5.0:0.5.0 - 0.5.0:0.5.0 FpxTensorCoreAQTLayout FpxTensorCoreLayoutType
torchao.dtypes.nf4tensor
  0.4.0:0.17.0 0.4.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 NF4Tensor
torchao.dtypes.uint4
  0.4.0:0.6.1 0.4.0:0.6.1 - - PerChannelSymmetricWeightUInt4Tensor UInt4Tensor
torchao.dtypes.uintx.Uintx
  0.5.0:0.5.0 0.5.0:0.5.0 - - UintxTensor
  0.5.0:0.5.0 0.5.0:0.5.0 0.5.0:0.5.0 0.5.0:0.5.0 UintxAQTLayout UintxLayoutType
torchao.dtypes.uintx.block_sparse_layout
  0.7.0:0.16.0 0.7.0:0.14.1 0.7.0:0.14.1 0.7.0:0.14.1 BlockSparseAQTTensorImpl BlockSparseLayout
torchao.dtypes.uintx.cutlass_int4_packed_layout
  0.8.0:0.15.0 0.8.0:0.14.1 0.8.0:0.14.1 0.8.0:0.14.1 CutlassInt4PackedLayout Int4PackedTensorImpl
torchao.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout
  0.12.0:0.16.0 0.12.0:0.14.1 0.12.0:0.14.1 0.12.0:0.14.1 DA8W4CPUAQTTensorImpl Int8DynamicActInt4WeightCPULayout
torchao.dtypes.uintx.gemlite_layout
  0.8.0:0.16.0 0.8.0:0.14.1 0.8.0:0.14.1 0.8.0:0.14.1 GemliteAQTTensorImpl GemlitePackedLayout
torchao.dtypes.uintx.int4_cpu_layout
  0.8.0:0.16.0 0.8.0:0.16.0 0.8.0:0.16.0 0.8.0:0.16.0 Int4CPUAQTTensorImpl Int4CPULayout
torchao.dtypes.uintx.int4_xpu_layout
  0.11.0:0.16.0 0.11.0:0.16.0 0.11.0:0.16.0 0.11.0:0.16.0 Int4XPUAQTTensorImpl Int4XPULayout
torchao.dtypes.uintx.marlin_qqq_layout
  0.7.0:0.7.0 0.7.0:0.7.0 0.7.0:0.7.0 0.7.0:0.7.0 MarlinQQQAQTTensorImpl MarlinQQQLayout
torchao.dtypes.uintx.marlin_qqq_tensor
  0.8.0:0.15.0 0.8.0:0.14.1 - - MarlinQQQTensor
  0.8.0:0.15.0 0.8.0:0.14.1 0.8.0:0.14.1 0.8.0:0.14.1 MarlinQQQAQTTensorImpl MarlinQQQLayout
torchao.dtypes.uintx.marlin_sparse_layout
  0.7.0:0.15.0 0.7.0:0.15.0 0.7.0:0.15.0 0.7.0:0.15.0 MarlinSparseAQTTensorImpl MarlinSparseLayout
torchao.dtypes.uintx.packed_linear_int8_dynamic_activation_intx_weight_layout
  0.10.0:0.10.0 0.10.0:0.10.0 - - _AffineQuantizedTensor
  0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl
  0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 PackedLinearInt8DynamicActivationIntxWeightLayout
  0.10.0:0.16.0 0.10.0:0.16.0 0.11.0:0.16.0 0.11.0:0.16.0 Target
torchao.dtypes.uintx.plain_layout
  0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 PlainAQTTensorImpl
torchao.dtypes.uintx.q_dq_layout
  0.10.0:0.10.0 0.10.0:0.10.0 0.10.0:0.10.0 0.10.0:0.10.0 _Impl
  0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 QDQLayout
  0.11.0:0.16.0 0.11.0:0.16.0 0.11.0:0.16.0 0.11.0:0.16.0 QDQTensorImpl
torchao.dtypes.uintx.semi_sparse_layout
  0.7.0:0.16.0 0.7.0:0.16.0 0.7.0:0.16.0 0.7.0:0.16.0 SemiSparseAQTTensorImpl SemiSparseLayout
torchao.dtypes.uintx.tensor_core_tiled_layout
  0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 TensorCoreTiledAQTTensorImpl TensorCoreTiledLayout
  0.7.0:0.7.0 0.7.0:0.7.0 0.7.0:0.7.0 0.7.0:0.7.0 Int4CPUAQTTensorImpl Int4CPULayout
torchao.dtypes.uintx.uint4_layout
  0.7.0:0.15.0 0.7.0:0.15.0 - - PerChannelSymmetricWeightUInt4Tensor UInt4Tensor
torchao.dtypes.uintx.uintx
  0.6.1:0.6.1 0.6.1:0.6.1 - - UintxTensor
  0.6.1:0.6.1 0.6.1:0.6.1 0.6.1:0.6.1 0.6.1:0.6.1 UintxAQTLayout UintxLayoutType
torchao.dtypes.uintx.uintx_layout
  0.7.0:0.16.0 0.7.0:0.14.1 - - UintxTensor
  0.7.0:0.16.0 0.7.0:0.14.1 0.7.0:0.14.1 0.7.0:0.14.1 UintxAQTTensorImpl UintxLayout
torchao.dtypes.utils
  0.4.0:0.6.1 0.4.0:0.6.1 0.5.0:0.6.1 0.5.0:0.6.1 PlainLayoutType
  0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 0.7.0:0.17.0 PlainLayout
torchao.experimental._linear_8bit_act_xbit_weight_layout
  0.7.0:0.8.0 0.7.0:0.8.0 - - Target
  0.7.0:0.8.0 0.7.0:0.8.0 - 0.7.0:0.8.0 Linear8BitActXBitWeightAQTTensorImpl Linear8BitActXBitWeightLayout
torchao.experimental.packed_linear_int8_dynamic_activation_intx_weight_layout
  0.9.0:0.13.0 0.9.0:0.9.0 - - Target
  0.9.0:0.13.0 0.9.0:0.9.0 - 0.9.0:0.9.0 PackedLinearInt8DynamicActivationIntxWeightLayout
  0.9.0:0.9.0 0.9.0:0.9.0 - - PackedLinearInt8DynamicActivationIntxWeightAtenTensor
  0.9.0:0.9.0 0.9.0:0.9.0 - 0.9.0:0.9.0 PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl
torchao.experimental.q_dq_layout
  0.9.0:0.13.0 0.9.0:0.9.0 - 0.9.0:0.9.0 QDQLayout
  0.9.0:0.9.0 0.9.0:0.9.0 - 0.9.0:0.9.0 _Impl
torchao.float8.config
  0.6.1:0.18.0 0.6.1:0.18.0 0.12.0:0.18.0 0.12.0:0.18.0 ScalingGranularity
torchao.float8.float8_tensor
  0.4.0:0.12.0 0.4.0:0.12.0 0.5.0:0.12.0 0.4.0:0.12.0 Float8Tensor GemmInputRole LinearMMConfig ScaledMMConfig
torchao.float8.float8_training_tensor
  0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 Float8TrainingTensor GemmInputRole LinearMMConfig
  0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 ScaledMMConfig
torchao.float8.fsdp_utils
  0.4.0:0.18.0 0.4.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 WeightWithDynamicFloat8CastTensor
torchao.float8.inference
  0.4.0:0.4.0 0.4.0:0.4.0 - - ActivationCasting
  0.5.0:0.18.0 0.5.0:0.18.0 0.6.1:0.18.0 0.6.1:0.18.0 Float8MMConfig
torchao.optim.subclass_4bit
  0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 OptimState4bit
torchao.optim.subclass_8bit
  0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 OptimState8bit
torchao.optim.subclass_fp8
  0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 0.10.0:0.18.0 OptimStateFp8
torchao.prototype.dtypes.floatx.floatx_tensor_core_layout
  0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 FloatxTensorCoreAQTTensorImpl FloatxTensorCoreLayout
torchao.prototype.dtypes.uint2
  0.4.0:0.9.0 0.4.0:0.9.0 - - UInt2Tensor
torchao.prototype.dtypes.uintx.block_sparse_layout
  0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 BlockSparseAQTTensorImpl BlockSparseLayout
torchao.prototype.dtypes.uintx.cutlass_int4_packed_layout
  0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 CutlassInt4PackedLayout Int4PackedTensorImpl
torchao.prototype.dtypes.uintx.dyn_int8_act_int4_wei_cpu_layout
  0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 DA8W4CPUAQTTensorImpl Int8DynamicActInt4WeightCPULayout
torchao.prototype.dtypes.uintx.gemlite_layout
  0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 GemliteAQTTensorImpl GemlitePackedLayout
torchao.prototype.dtypes.uintx.marlin_qqq_tensor
  0.15.0:0.15.0 0.15.0:0.15.0 - - MarlinQQQTensor
  0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 0.15.0:0.15.0 MarlinQQQAQTTensorImpl MarlinQQQLayout
torchao.prototype.dtypes.uintx.uintx_layout
  0.15.0:0.16.0 0.15.0:0.16.0 - - UintxTensor
  0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 0.15.0:0.16.0 UintxAQTTensorImpl UintxLayout
torchao.prototype.dtypes.uintx.uintx_utils
  0.17.0:0.17.0 0.17.0:0.17.0 - 0.17.0:0.17.0 UintxAQTTensorImpl UintxLayout
  0.17.0:0.18.0 0.17.0:0.18.0 - - UintxTensor
torchao.prototype.float8_opaque_tensor
  0.15.0:0.18.0 0.15.0:0.18.0 - 0.15.0:0.18.0 Float8OpaqueTensor
torchao.prototype.int4_opaque_tensor
  0.15.0:0.16.0 0.15.0:0.16.0 - 0.15.0:0.16.0 Int4OpaqueTensor
torchao.prototype.mx_formats.config
  0.13.0:0.18.0 0.13.0:0.18.0 - 0.14.1:0.18.0 ScaleCalculationMode
torchao.prototype.mx_formats.mx_tensor
  0.13.0:0.18.0 0.13.0:0.18.0 - 0.14.1:0.18.0 QuantizeTensorToMXKwargs
  0.4.0:0.18.0 0.4.0:0.18.0 - 0.12.0:0.18.0 MXTensor
  0.9.0:0.18.0 0.9.0:0.12.0 - - ScaleCalculationMode
torchao.prototype.mx_formats.nvfp4_tensor
  0.12.0:0.14.1 0.12.0:0.14.1 - 0.12.0:0.14.1 NVFP4MMConfig
  0.12.0:0.18.0 0.12.0:0.18.0 - 0.12.0:0.18.0 NVFP4Tensor
  0.13.0:0.18.0 0.13.0:0.18.0 - 0.15.0:0.18.0 QuantizeTensorToNVFP4Kwargs
torchao.prototype.quantization.autoquant_v2
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQBFloat16LinearWeight AQDefaultLinearWeight AQFloat16LinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQFloat32LinearWeight AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQFloat8WeightOnlyQuantizedLinearWeight AQInt4G128WeightOnlyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQInt4G256WeightOnlyQuantizedLinearWeight AQInt4G32WeightOnlyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQInt4G64WeightOnlyQuantizedLinearWeight AQInt8DynamicallyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQInt8WeightOnlyQuantizedLinearWeight AQInt8WeightOnlyQuantizedLinearWeight2
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQInt8WeightOnlyQuantizedLinearWeight3 BFloat16Tensor Float16Tensor Float32Tensor
torchao.prototype.quantization.codebook.codebook_quantized_tensor
  0.8.0:0.18.0 0.8.0:0.18.0 - - CodebookQuantizedTensor
torchao.prototype.quantization.codebook_coreml.codebook_quantized_tensor
  0.12.0:0.18.0 0.12.0:0.18.0 - - CodebookQuantizedTensor
torchao.prototype.quantization.codebook_groupwise.codebook_quantized_tensor
  0.13.0:0.18.0 0.13.0:0.18.0 - - CodebookQuantizedPackedTensor
torchao.prototype.quantization.dynamic_activation_lut.int8_dynamic_activation_lut_tensor
  0.13.0:0.13.0 0.13.0:0.13.0 - 0.13.0:0.13.0 Int8DynamicActivationLutTensor
torchao.prototype.quantization.float8_static_quant.prototype_float8_tensor
  0.16.0:0.18.0 0.17.0:0.18.0 - 0.17.0:0.18.0 PrototypeFloat8Tensor
torchao.prototype.quantization.gguf.gguf_quantized_tensor
  0.11.0:0.18.0 0.11.0:0.18.0 0.16.0:0.18.0 0.11.0:0.18.0 GGUFQuantizedTensor
torchao.prototype.quantization.int4
  0.17.0:0.18.0 0.17.0:0.18.0 - 0.17.0:0.18.0 Int4OpaqueTensor
torchao.prototype.quantization.int8_lut_tensor.int8_lut_tensor
  0.14.1:0.18.0 0.14.1:0.18.0 - 0.14.1:0.18.0 Int8LutTensor
torchao.prototype.quantization.uintx.uintx_bit_packed_tensor
  0.17.0:0.18.0 0.17.0:0.18.0 - 0.17.0:0.18.0 UIntxBitPackedTensor
torchao.quantization
  0.13.0:0.13.0 0.13.0:0.13.0 0.13.0:0.13.0 0.13.0:0.13.0 IntxUnpackedTensor
  0.13.0:0.15.0 0.13.0:0.15.0 0.13.0:0.15.0 0.13.0:0.15.0 Int4MarlinSparseTensor
  0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 Float8Tensor Int4PreshuffledTensor Int4Tensor
  0.14.1:0.14.1 0.14.1:0.14.1 0.14.1:0.14.1 0.14.1:0.14.1 Int4OpaqueTensor
  0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 Int4PlainInt32Tensor Int4TilePackedTo4dTensor
  0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 IntxOpaqueTensor IntxUnpackedToInt8Tensor
  0.15.0:0.18.0 0.15.0:0.18.0 0.15.0:0.18.0 0.15.0:0.18.0 Int8Tensor
torchao.quantization.autoquant
  0.4.0:0.16.0 0.4.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQInt8DynamicallyQuantizedLinearWeight
  0.4.0:0.4.0 0.4.0:0.4.0 - - AQWeightOnlyQuantizedLinearWeight AQWeightOnlyQuantizedLinearWeight2
  0.4.0:0.4.0 0.4.0:0.4.0 - - AQWeightOnlyQuantizedLinearWeight3
  0.4.0:0.6.1 0.4.0:0.6.1 - - AQFloatLinearWeight
  0.5.0:0.16.0 0.5.0:0.16.0 - - AQInt4G128WeightOnlyQuantizedLinearWeight AQInt4G256WeightOnlyQuantizedLinearWeight
  0.5.0:0.16.0 0.5.0:0.16.0 - - AQInt4G32WeightOnlyQuantizedLinearWeight AQInt8WeightOnlyQuantizedLinearWeight3
  0.5.0:0.16.0 0.5.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQInt4G64WeightOnlyQuantizedLinearWeight
  0.5.0:0.16.0 0.5.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQInt8WeightOnlyQuantizedLinearWeight
  0.5.0:0.16.0 0.5.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQInt8WeightOnlyQuantizedLinearWeight2
  0.6.1:0.16.0 0.6.1:0.16.0 - - AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight
  0.6.1:0.16.0 0.6.1:0.16.0 - - AQFloat8WeightOnlyQuantizedLinearWeight
  0.7.0:0.16.0 0.7.0:0.16.0 - - AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight
  0.7.0:0.16.0 0.7.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQBFloat16LinearWeight AQDefaultLinearWeight
  0.7.0:0.16.0 0.7.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQFloat16LinearWeight AQFloat32LinearWeight
  0.8.0:0.15.0 0.8.0:0.15.0 0.8.0:0.15.0 0.8.0:0.15.0 AQInt4G128WeightOnlyQuantizedMarlinSparseLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQGemliteInt4G128WeightOnlyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQGemliteInt4G256WeightOnlyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 - - AQGemliteInt4G32WeightOnlyQuantizedLinearWeight BFloat16Tensor Float16Tensor
  0.8.0:0.16.0 0.8.0:0.16.0 - - Float32Tensor
  0.8.0:0.16.0 0.8.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQGemliteInt4G64WeightOnlyQuantizedLinearWeight
  0.8.0:0.16.0 0.8.0:0.16.0 0.8.0:0.15.0 0.8.0:0.16.0 AQInt8DynamicallyQuantizedSemiSparseLinearWeight
torchao.quantization.granularity
  0.14.1:0.18.0 0.14.1:0.18.0 0.15.0:0.18.0 0.15.0:0.18.0 PerBlock
  0.7.0:0.18.0 0.7.0:0.18.0 - - PerAxis PerGroup PerToken
  0.7.0:0.18.0 0.7.0:0.18.0 0.7.0:0.18.0 0.7.0:0.18.0 PerRow PerTensor
torchao.quantization.linear_activation_quantized_tensor
  0.4.0:0.17.0 0.4.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 LinearActivationQuantizedTensor
torchao.quantization.linear_activation_scale
  0.6.1:0.17.0 0.6.1:0.17.0 0.6.1:0.17.0 0.6.1:0.17.0 WeightTensorWithLinearActivationScaleMetadata
torchao.quantization.observer
  0.5.0:0.13.0 0.5.0:0.6.1 - - PerAxis
  0.5.0:0.18.0 0.5.0:0.6.1 0.6.1:0.6.1 0.6.1:0.6.1 PerRow PerTensor
  0.6.1:0.6.1 0.6.1:0.6.1 - - PerGroup
torchao.quantization.quant_api
  0.10.0:0.15.0 0.10.0:0.15.0 0.10.0:0.15.0 0.10.0:0.15.0 _int4_symm_cutlass_quant _int8_symm_cutlass_quant
  0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 0.10.0:0.16.0 _float8_cutlass_quant
  0.12.0:0.17.0 0.12.0:0.17.0 - - _uint8_asymm_per_token_quant
  0.5.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 _int8_asymm_per_token_quant
  0.5.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 0.5.0:0.17.0 _int8_symm_per_token_reduced_range_quant
  0.5.0:0.5.0 0.5.0:0.5.0 - - _input_quant_func_dyanmic_fp8
  0.6.1:0.16.0 0.6.1:0.16.0 0.6.1:0.16.0 0.6.1:0.16.0 _input_activation_quant_func_fp8
  0.7.0:0.17.0 0.7.0:0.17.0 - - _int8_symm_per_token_quant
  0.8.0:0.17.0 0.8.0:0.17.0 - - _int8_symm_per_token_reduced_range_quant_noop_decode
  0.8.0:0.9.0 0.8.0:0.9.0 0.8.0:0.9.0 0.8.0:0.9.0 _int8_symm_per_token_reduced_range_quant_cutlass
torchao.quantization.quant_primitives
  0.4.0:0.18.0 0.4.0:0.18.0 0.5.0:0.18.0 0.5.0:0.18.0 MappingType ZeroPointDomain
  0.7.0:0.18.0 0.7.0:0.18.0 - - TorchAODType
torchao.quantization.quantize_.common.kernel_preference
  0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 KernelPreference
torchao.quantization.quantize_.common.packing_format
  0.13.0:0.18.0 0.13.0:0.18.0 - - PackingFormat
torchao.quantization.quantize_.common.quantization_step
  0.16.0:0.18.0 0.16.0:0.18.0 - - QuantizationStep
torchao.quantization.quantize_.int4_groupwise_preshuffle_tensor
  0.12.0:0.12.0 - - - Int4GroupwisePreshuffleTensor
torchao.quantization.quantize_.workflows.float8.float8_packing_format
  0.16.0:0.18.0 0.16.0:0.18.0 0.16.0:0.18.0 0.16.0:0.18.0 Float8PackingFormat
torchao.quantization.quantize_.workflows.float8.float8_sparse_2x4_1d_data_1d_metadata_tensor
  0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 Float8Sparse2x4_1DData1DMetadataTensor
torchao.quantization.quantize_.workflows.float8.float8_sparse_2x4_2d_data_2d_metadata_tensor
  0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 Float8Sparse2x4_2DData2DMetadataTensor
torchao.quantization.quantize_.workflows.float8.float8_tensor
  0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 0.13.0:0.18.0 QuantizeTensorToFloat8Kwargs
torchao.quantization.quantize_.workflows.float8.sparse_2x4_cutlass_float8_tensor
  0.16.0:0.17.0 0.16.0:0.17.0 0.16.0:0.17.0 0.16.0:0.17.0 Sparse2x4CUTLASSFloat8Tensor
torchao.quantization.quantize_.workflows.int4.int4_choose_qparams_algorithm
  0.14.1:0.18.0 0.14.1:0.18.0 - - Int4ChooseQParamsAlgorithm
torchao.quantization.quantize_.workflows.int4.int4_packing_format
  0.14.1:0.18.0 0.14.1:0.18.0 - - Int4PackingFormat
torchao.quantization.quantize_.workflows.int8.int8_tensor
  0.15.0:0.18.0 0.15.0:0.18.0 0.15.0:0.18.0 0.15.0:0.18.0 QuantizeTensorToInt8Kwargs
torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm
  0.14.1:0.18.0 0.14.1:0.18.0 - - IntxChooseQParamsAlgorithm
torchao.quantization.quantize_.workflows.intx.intx_packing_format
  0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 IntxPackingFormat
torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor
  0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 0.14.1:0.18.0 IntxUnpackedToInt8TensorActivationQuantization
torchao.quantization.quantize_.workflows.nf4.nf4_tensor
  0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 0.18.0:0.18.0 NF4Tensor
torchao.quantization.subclass
  0.4.0:0.14.1 0.4.0:0.14.1 - - Int4WeightOnlyQuantizedLinearWeight Int8DynamicallyQuantizedLinearWeight
  0.4.0:0.14.1 0.4.0:0.14.1 - - Int8WeightOnlyQuantizedLinearWeight
torchao.quantization.weight_tensor_linear_activation_quantization
  0.6.1:0.17.0 0.6.1:0.17.0 0.6.1:0.15.0 0.6.1:0.17.0 WeightTensorWithLinearActivationQuantizationMetadata
"""
