"""When a ViT is block-recurrent: a study by many short distillations, and an atlas of phases."""
