#include "attention/tokenizer/template.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* Pieces as the templates of well-known models have them (written here, not copied). */
static void found_by_content(void **state) {
    (void)state;
    static const struct {
        const char *text, *name;
    } cases[] = {
        {"{{'<|im_start|>' + message['role'] + '\n'}}", "chatml"},
        {"{{ '<|start_header_id|>' + role + '<|end_header_id|>' }} ... <|eot_id|>", "llama3"},
        {"{{ bos_token }}{{ '<start_of_turn>' + role }}", "gemma"},
        {"{{ '<|user|>' + '\n' + content + '<|end|>' }}{{ '<|assistant|>' }}", "phi3"},
        {"{{ '<|user|>\n' + content + eos_token }}{{ '<|assistant|>\n' }}", "zephyr"},
        {"{{ '<|start_of_role|>user<|end_of_role|>' }} <|end_of_text|>", "granite"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ibid_template *t = ibid_template_find(cases[i].text);
        assert_non_null(t);
        assert_string_equal(t->name, cases[i].name);
        assert_ptr_equal(t, ibid_template_by_name(cases[i].name));
    }
    assert_null(ibid_template_find("{{ content }}"));
    assert_null(ibid_template_find(""));
    assert_null(ibid_template_find(NULL));
    assert_null(ibid_template_by_name("no-such"));
    assert_null(ibid_template_by_name(NULL));
}

/* A conversation put together from each table row, against what that model family's own template
 * gives for the same turns. */
static void turns_are_complete(void **state) {
    (void)state;
    static const struct {
        const char *name, *want;
    } cases[] = {
        {"chatml",
         "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
         "A<|im_end|>\n<|im_start|>assistant\n"},
        {"llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"},
        {"gemma", "<bos><start_of_turn>user\nS<end_of_turn>\n<start_of_turn>user\nU<end_of_turn>\n"
                  "<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>model\n"},
        {"phi3",
         "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|assistant|>\n"},
        {"zephyr", "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|assistant|>\n"},
        {"granite", "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n"
                    "<|start_of_role|>user<|end_of_role|>U<|end_of_text|>\n"
                    "<|start_of_role|>assistant<|end_of_role|>A<|end_of_text|>\n"
                    "<|start_of_role|>assistant<|end_of_role|>"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ibid_template *t = ibid_template_by_name(cases[i].name);
        char text[1024];
        assert_non_null(t);
        (void)snprintf(text, sizeof text, "%s%sS%s%sU%s%sA%s%s", t->begin_text, t->system_open,
                       t->system_close, t->user_open, t->user_close, t->assistant_open,
                       t->assistant_close, t->assistant_open);
        assert_string_equal(text, cases[i].want);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(found_by_content),
                                       cmocka_unit_test(turns_are_complete)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
