"""How `--help` orders options: one heading a group, the same everywhere, since an option has one meaning everywhere."""

GROUPS = {
    "Data": "images test_images ood_images channels max_unreadable value_range views min_crop_scale num_views "
    "color_jitter seg_masks test_seg_masks ignore_labels annotations test_annotations short_side streaming",
    "Labels": "labels_per_class num_seeds",
    "Backbones": "backbone run bundle",
    "Tokens": "tokenizer tokens trust_teacher sample",
    "Teacher": "teacher teacher_checkpoint teacher_image_size teacher_layer teacher_final_norm",
    "Model": "model model_args image_size patch_size init_from from_scratch decoder_depth drop_path layer_scale_init pool format dtype "
    "license",
    "Objective": "objective target mask_ratio patch_order num_predict separate_query_token",
    "Quantizer": "quantizer vocab_size fsq_levels pca_dim patches_per_code",
    "Codebook": "codebook_dim dead_code_threshold",
    "K-means": "kmeans_init kmeans_iters kmeans_n_init kmeans_batch_size kmeans_metric",
    "Augmentation": "rand_augment mixup cutmix random_erasing",
    "Regularization": "label_smoothing layer_decay ema_decay",
    "Protocols": "protocols linear_epochs few_shot",
    "Robustness": "eval_image_sizes",
    "Dense tasks": "dense_epochs",
    "Grid": "tokenizers grid seeds compare_by equal_compute report_only devices",
    "Optimization": "opt epochs warmup_epochs batch_size lr min_lr weight_decay clip_grad seed",
    "Hardware": "device precision micro_batch_size compile fsdp memory_gb benchmark",
    "Output": "out resume figures figures_dir serve",
    "Checkpoints": "checkpoint_interval_min max_rollbacks",
    "Logging": "log_interval probe_every probe_images track",
}
"""Heading -> its options, in order."""

GROUP_OF = {name: heading for heading, names in GROUPS.items() for name in names.split()}
RANK = {name: rank for rank, name in enumerate(GROUP_OF)}

_BASIC = """images test_images backbone run tokenizer tokens teacher model image_size patch_size objective target mask_ratio quantizer
vocab_size views protocols labels_per_class tokenizers grid epochs batch_size lr device out resume"""
BASIC = frozenset(_BASIC.split())
"""Options in the first `--help` of a command that has more than 15."""
MAX_BASIC = 15
