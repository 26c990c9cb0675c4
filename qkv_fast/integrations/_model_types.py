"""Models of transformers 5.24 whose layers all call a registered attention function wherever they use a mask.

Made by tests/integrations/test_transformers.py, which counts the calls and compares what tiny models give.
"""

MODEL_TYPES = set(
    (
        "afmoe albert altclip_text_model apertus apertus1p5_text arcee aria_text axk1 bart beam beit bert "
        "bert-generation biogpt bitnet blenderbot blenderbot-small camembert chinese_clip_text_model clip_text_model "
        "clipseg_text_model cohere cohere2 cohere2_moe ctrl cwm data2vec-audio data2vec-text deepseek_v3 deit "
        "diffllama dinov2 dinov2_with_registers distilbert doge dpr electra embedding_gemma2_text emu3_text_model "
        "ernie ernie4_5 ernie4_5_moe eurobert exaone exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text "
        "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite "
        "granite_docling_text granite_swa granitemoe granitemoe_swa granitemoeshared gte helium higgs_audio_v2 "
        "hrm_text hubert hy_v3 hyperclovax idefics3_vision ijepa inkling_text internlm3 iquestcoder jais2 jetmoe "
        "jina_embeddings_v3 kimi_linear kolibri1 kosmos_2_5_text_model laguna lara_mini lfm2 lfm3 llama llama4_text "
        "longt5 m2m_100 marian mbart mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral3 "
        "mistral mixtral mllama_text_model modernbert modernbert-decoder molmo2_text moonshine moshi mt5 "
        "muse_glimmer_text muse_spark_text nanochat nomic_bert olmo olmo2 olmo3 olmo_hybrid olmoe "
        "openai_privacy_filter opt owlv2_text_model owlvit_text_model pegasus persimmon phi phi3 phimoe pixio plbart "
        "qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text "
        "roberta roberta-prelayernorm roc_bert sam3_detr_decoder sam3_detr_encoder sam3_mask_decoder sarvam_mla "
        "sarvam_moe seamless_m4t seamless_m4t_v2 seed_oss sew siglip_text_model smollm3 smolvlm_vision solar_open "
        "speech_to_text stablelm starcoder2 switch_transformers t5 t5_gemma_module t5gemma2_decoder t5gemma2_text "
        "tipsv2_text_model tipsv2_vision_model ultrabert umt5 unispeech unispeech-sat vaultgemma vit vit_mae vit_msn "
        "vivit voxtral_realtime_encoder wav2vec2 wav2vec2-bert wav2vec2-conformer whisper xlm-roberta xlm-roberta-xl "
        "youtu zaya"
    ).split()
)
