#include "attention/tokenizer/template.h"

#include <string.h>

/* Looked at in this order: a template's `match` may occur in a later one's text, never an earlier
 * one's. */
static const ibid_template known[] = {
    {.name = "llama3",
     .match = "<|start_header_id|>",
     .begin_text = "<|begin_of_text|>",
     .system_open = "<|start_header_id|>system<|end_header_id|>\n\n",
     .system_close = "<|eot_id|>",
     .user_open = "<|start_header_id|>user<|end_header_id|>\n\n",
     .user_close = "<|eot_id|>",
     .assistant_open = "<|start_header_id|>assistant<|end_header_id|>\n\n",
     .assistant_close = "<|eot_id|>"},
    {.name = "chatml",
     .match = "<|im_start|>",
     .begin_text = "",
     .system_open = "<|im_start|>system\n",
     .system_close = "<|im_end|>\n",
     .user_open = "<|im_start|>user\n",
     .user_close = "<|im_end|>\n",
     .assistant_open = "<|im_start|>assistant\n",
     .assistant_close = "<|im_end|>\n"},
    {.name = "gemma", /* has no system turn: its text opens the user's turn like a user's */
     .match = "<start_of_turn>",
     .begin_text = "<bos>",
     .system_open = "<start_of_turn>user\n",
     .system_close = "<end_of_turn>\n",
     .user_open = "<start_of_turn>user\n",
     .user_close = "<end_of_turn>\n",
     .assistant_open = "<start_of_turn>model\n",
     .assistant_close = "<end_of_turn>\n"},
    {.name = "granite",
     .match = "<|start_of_role|>",
     .begin_text = "",
     .system_open = "<|start_of_role|>system<|end_of_role|>",
     .system_close = "<|end_of_text|>\n",
     .user_open = "<|start_of_role|>user<|end_of_role|>",
     .user_close = "<|end_of_text|>\n",
     .assistant_open = "<|start_of_role|>assistant<|end_of_role|>",
     .assistant_close = "<|end_of_text|>\n"},
    {.name = "phi3",
     .match = "<|end|>",
     .begin_text = "",
     .system_open = "<|system|>\n",
     .system_close = "<|end|>\n",
     .user_open = "<|user|>\n",
     .user_close = "<|end|>\n",
     .assistant_open = "<|assistant|>\n",
     .assistant_close = "<|end|>\n"},
    {.name = "zephyr",
     .match = "<|user|>",
     .begin_text = "",
     .system_open = "<|system|>\n",
     .system_close = "</s>\n",
     .user_open = "<|user|>\n",
     .user_close = "</s>\n",
     .assistant_open = "<|assistant|>\n",
     .assistant_close = "</s>\n"},
};

const ibid_template *ibid_template_find(const char *gguf_template) {
    for (size_t i = 0; gguf_template && i < sizeof known / sizeof *known; i++)
        if (strstr(gguf_template, known[i].match)) return &known[i];
    return NULL;
}

const ibid_template *ibid_template_by_name(const char *name) {
    for (size_t i = 0; name && i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i].name) == 0) return &known[i];
    return NULL;
}
