"""Keys of config.json files that only describe training, files or decoding defaults."""

# Keys of Hugging Face configs without influence on the logits of a decoder in inference: what transformers keeps of
# every model, training, other programs' notes, and decoding defaults (transformers' GenerationConfig) saved with them.
HARMLESS = (
    "_attn_implementation*", "_commit_hash", "_experts_implementation*", "_flash_attn_*", "_from_model_config",
    "_name_or_path", "add_bos_token", "add_eos_token", "architectures", "attention_dropout",
    "attention_probs_dropout_prob", "attn_implementation", "auto_map", "aux_loss_alpha", "bos_token", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout*", "cls_token_id", "compression_config", "custom_generate",
    "dropout", "dtype", "embd_pdrop", "eos_token", "eos_token_id", "ep_size", "experts_implementation",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "language",
    "license", "max_sequence_length", "model_max_length", "model_type", "name_or_path", "neftune_noise_alpha",
    "num_key_value_groups", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token", "pad_token_id", "padding_side", "pretraining_tp", "problem_type", "quantization",
    "quantization_config", "resid_pdrop", "return_dict", "router_aux_loss_coef", 
    "router_z_loss_coef", "sep_token_id", "seq_aux", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unk_token", "unk_token_id", "unsloth_*",
    "use_bfloat16", "use_cache", "use_flash_attn*", "use_flash_attention*", "vocab_file",
    # KoboldAI's
    "antemplate", "badwordsids", "formatoptns", "newlinemode", "welcome",
    # decoding
    "assistant_*", "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config",
    "constraints", "continuous_batching_config", "decoder_start_token_id", "disable_compile", "diversity_penalty",
    "do_sample", "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "generation_config", "guidance_scale", "is_assistant", "length_penalty", "low_memory",
    "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length",
    "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens*", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "sequence_bias", "speculation_type", "stop_strings", "suppress_tokens",
    "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_mtp",
    "watermarking_config",
)  # fmt: skip
