"""Names that options, recipes and classes had in earlier versions or have elsewhere, and what they are called here."""

VIEW_SIZE = "method.view.size"
RENAMED = {
    # Options of earlier versions, by their whole name, or by their last part where that is unique.
    "out": "out_dir",
    "weights": "init_from",
    "accumulate": "grad_accum_steps",
    "best": "monitor",
    "keep": "keep_last",
    "clip": "clip_grad_norm",
    "decay_vectors": "decay_bias_and_norm",
    "lr_reference_batch": "base_batch_size",
    "data.world": "data.shapes",
    "world": "shapes",
    "pictures": "num_train",
    "test_pictures": "num_test",
    "heads": "num_heads",
    "codes": "num_codes",
    "decoder_heads": "decoder_num_heads",
    "predictor_heads": "predictor_num_heads",
    "top_layers": "num_top_layers",
    "partner_groups": "num_mix_groups",
    "alignment": "alignment_weight",
    "commitment": "commitment_weight",
    "projector_layers": "projector_num_layers",
    # The names of these options in other libraries.
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "wd": "optimizer.weight_decay",
    "image_size": VIEW_SIZE,
    "img_size": VIEW_SIZE,
    "output": "out_dir",
    "output_dir": "out_dir",
    "workers": "data.workers",
    "num_workers": "data.workers",
    "arch": "method.backbone",
    "data_dir": "data.folder",
    "max_epochs": "epochs",
    "pretrained": "init_from",
    "gpus": "torchrun --nproc-per-node GPUS -m sslbook.train ...; every process has one",
}
GONE = ("backend", "cudnn_benchmark", "tokenizer_steps")  # chosen by themselves now, or made by a run of their own
RENAMED_CLASSES = {
    "Pictures": "sslbook.loggers.Plots",
    "sslbook.hooks.": "sslbook.loggers.",
    "PrototypeHead": "sslbook.nn.DINOHead",
}
