/* SPDX-License-Identifier: MIT */
/* Feed a harness without libFuzzer: FOLDER ROUNDS. Each file as it is, then ROUNDS mutations of each, the same in each run. */
#include "flat.h"

#include <dirent.h>

static uint64_t state = 88172645463325252ull;
static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

int main(int argc, char **argv)
{
    static uint8_t input[1 << 15], changed[1 << 15];
    DIR *folder = argc == 3 ? opendir(argv[1]) : NULL;
    long rounds = argc == 3 ? atol(argv[2]) : 0, files = 0;
    if (!folder)
        return 2;
    for (struct dirent *e; (e = readdir(folder));) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", argv[1], e->d_name);
        FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (!f)
            continue;
        size_t n = fread(input, 1, sizeof(input), f);
        fclose(f);
        files++;
        LLVMFuzzerTestOneInput(input, n);
        for (long i = 0; n && i < rounds; i++) {
            memcpy(changed, input, n);
            for (uint64_t k = 0; k <= next() % 8; k++)
                changed[next() % n] = (uint8_t)next();
            LLVMFuzzerTestOneInput(changed, n);
        }
    }
    closedir(folder);
    printf("%ld files\n", files);
    return files == 0;
}
