"""What benchmarks can be asked for."""

# int8 is for CPUs; float8, CUDA graphs and the compiler's own choice of kernels are for GPUs
FORMS = ("plain", "compiled", "graphs", "autotuned", "int8", "float8")

# shapes of DINOv2 ViT-B/14 at 224 px, with a narrow FFN that makes extraction quick, and of the
# digits teacher: 13 × 261 × 768 and 13 × 21 × 64 numbers an image
TEACHERS = {
    "base": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
    "small": dict(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
    "digits": dict(hidden_size=64, num_attention_heads=4, image_size=16, patch_size=4),
}
