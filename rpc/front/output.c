#include "rpc/front/output.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static bool colour;

void ibidi_out_init(const ibid_opts *o) {
    if (strcmp(o->color, "always") == 0)
        colour = true;
    else if (strcmp(o->color, "never") == 0)
        colour = false;
    else
        colour = isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
}

const char *ibidi_bold(void) {
    return colour ? "\033[1m" : "";
}
const char *ibidi_dim(void) {
    return colour ? "\033[2m" : "";
}
const char *ibidi_mark(void) {
    return colour ? "\033[1;33m" : "";
}
const char *ibidi_plain(void) {
    return colour ? "\033[0m" : "";
}

/* Length of the valid UTF-8 sequence at s, 0 if there is none. */
static size_t utf8_length(const unsigned char *s, size_t n) {
    if (s[0] < 0x80) return 1;
    size_t len = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : s[0] >= 0xC2 ? 2 : 0;
    if (s[0] > 0xF4 || len == 0 || len > n) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if (len == 3 && ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F))) return 0;
    if (len == 4 && ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F))) return 0;
    return len;
}

json_t *ibidi_json_text(const char *s, size_t n) {
    json_t *j = json_stringn(n ? s : "", n);
    if (j) return j;
    ibid_buf b;
    ibid_buf_init(&b, 4 * n + 16);
    for (size_t i = 0; i < n;) {
        size_t len = utf8_length((const unsigned char *)s + i, n - i);
        if (len)
            (void)ibid_buf_append(&b, s + i, len);
        else
            (void)ibid_buf_puts(&b, "\xEF\xBF\xBD");
        i += len ? len : 1;
    }
    j = json_stringn(b.data ? b.data : "", b.len);
    ibid_buf_fini(&b);
    return j;
}

json_t *ibidi_json_str(ibid_str s) {
    return ibidi_json_text(s.s, s.n);
}

static json_t *json_hex(const void *data, size_t n) {
    ibid_buf b;
    ibid_buf_init(&b, 2 * n + 1);
    for (size_t i = 0; i < n; i++) (void)ibid_buf_printf(&b, "%02x", ((const uint8_t *)data)[i]);
    json_t *j = json_stringn(b.data ? b.data : "", b.len);
    ibid_buf_fini(&b);
    return j;
}

json_t *ibidi_json_value(const ibid_val *v) {
    const char *s;
    const void *p;
    size_t n;
    uint64_t u;
    int64_t i;
    double d;
    bool b;
    if (ibid_val_is_map(v)) {
        json_t *o = json_object();
        const ibid_val *item;
        for (size_t k = 0; ibid_val_pair(v, k, &s, &n, &item); k++) {
            char key[128];
            (void)snprintf(key, sizeof key, "%.*s", (int)n, s);
            (void)json_object_set_new(o, key, ibidi_json_value(item));
        }
        return o;
    }
    if (ibid_val_is_array(v)) {
        json_t *a = json_array();
        for (size_t k = 0; k < ibid_val_count(v); k++)
            (void)json_array_append_new(a, ibidi_json_value(ibid_val_at(v, k)));
        return a;
    }
    if (ibid_val_is_text(v) && ibid_val_str(v, &s, &n)) return ibidi_json_text(s, n);
    if (ibid_val_bin(v, &p, &n)) return json_hex(p, n);
    if (ibid_val_u64(v, &u)) return json_integer((json_int_t)u);
    if (ibid_val_i64(v, &i)) return json_integer(i);
    if (ibid_val_f64(v, &d)) return json_real(d);
    if (ibid_val_bool(v, &b)) return json_boolean(b);
    return json_null();
}

int ibidi_json_print(json_t *j) {
    int bad =
        !j || json_dumpf(j, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6) | JSON_ENCODE_ANY) != 0;
    bad |= putchar('\n') == EOF || fflush(stdout) != 0;
    json_decref(j);
    return bad ? 2 : 0;
}

int ibidi_report(const ibid_cli *cli, ibid_err e) {
    const char *detail = *ibid_err_detail() ? ibid_err_detail() : ibid_err_text(e);
    if (cli->o.json)
        (void)ibidi_json_print(json_pack("{s:{s:s,s:o}}", "error", "code", ibid_err_code(e),
                                         "message", ibidi_json_text(detail, strlen(detail))));
    (void)fflush(stdout);
    (void)fprintf(stderr, "ibid: %s: %s\n", ibid_err_code(e), detail);
    return 2;
}

const char *ibidi_bytes(uint64_t n, char out[32]) {
    static const char *const unit[] = {"B", "KB", "MB", "GB", "TB"};
    double v = (double)n;
    size_t u = 0;
    while (v >= 1000 && u < 4) {
        v /= 1000;
        u++;
    }
    (void)snprintf(out, 32, u == 0 ? "%.0f %s" : "%.1f %s", v, unit[u]);
    return out;
}

const char *ibidi_seconds(double s, char out[32]) {
    if (s < 60)
        (void)snprintf(out, 32, "%.1f s", s);
    else if (s < 3600)
        (void)snprintf(out, 32, "%.0f min %02.0f s", (double)(int)(s / 60), s - 60 * (int)(s / 60));
    else
        (void)snprintf(out, 32, "%.1f h", s / 3600);
    return out;
}

void ibidi_print_line(ibid_str text, size_t width) {
    size_t columns = 0, i = 0;
    bool space = false;
    while (i < text.n && columns < width) {
        unsigned char c = (unsigned char)text.s[i];
        if (c <= ' ') {
            if (!space) {
                putchar(' ');
                columns++;
            }
            space = true;
            i++;
            continue;
        }
        size_t len = utf8_length((const unsigned char *)text.s + i, text.n - i);
        if (len)
            (void)fwrite(text.s + i, 1, len, stdout);
        else
            putchar('?');
        i += len ? len : 1;
        columns++;
        space = false;
    }
    if (i < text.n) (void)fputs("...", stdout);
}
