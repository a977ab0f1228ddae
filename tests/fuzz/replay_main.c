/* Runs a fuzz target over a folder of inputs (its corpus), so that every input ever found stays a
 * test. Usage: replay_NAME FOLDER. An empty or missing corpus is an error, not a pass. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return 1;
    if (fseek(f, 0, SEEK_END) != 0) return fclose(f), 1;
    long size = ftell(f);
    if (size < 0 || fseek(f, 0, SEEK_SET) != 0) return fclose(f), 1;
    /* Exactly size bytes, so that a sanitizer sees the first byte read past the end. */
    uint8_t *data = malloc(size ? (size_t)size : 1);
    int bad = !data || fread(data, 1, (size_t)size, f) != (size_t)size;
    (void)fclose(f);
    if (!bad) (void)LLVMFuzzerTestOneInput(data, (size_t)size);
    free(data);
    return bad;
}

int main(int argc, char **argv) {
    DIR *dir = argc == 2 ? opendir(argv[1]) : NULL;
    if (!dir) return fprintf(stderr, "usage: %s CORPUS_FOLDER\n", argv[0]), 2;
    size_t n = 0;
    int bad = 0;
    for (struct dirent *d; (d = readdir(dir));) {
        if (d->d_name[0] == '.') continue;
        char path[4096];
        (void)snprintf(path, sizeof path, "%s/%s", argv[1], d->d_name);
        bad |= replay(path);
        n++;
    }
    (void)closedir(dir);
    printf("replayed %zu inputs\n", n);
    return bad || n == 0;
}
