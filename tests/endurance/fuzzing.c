/*
 * libFuzzer in a shared library, for fuzz_records.py: what inputs are changed by, randomness that repeats itself, and
 * keys that are derived in no time.
 *
 * An input is a header and instructions, four bytes each (fuzzed_inputs.py). libFuzzer's own changes, of single
 * bytes, would move all that follows by one; so an instruction is what is added, taken out, repeated and moved here, and
 * its own changes are left to one instruction, or to the header.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define STEP 4

int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*run)(const uint8_t *data, size_t size));
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t limit);

static uint64_t mutations, random_state;

static uint64_t next_of(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static size_t below(size_t limit)
{
    return limit ? next_of(&mutations) % limit : 0;
}

static size_t change(uint8_t *data, size_t size, size_t limit)
{
    size_t n = size / STEP, at = below(n), from, count, i;
    if (n < 2) {
        size = LLVMFuzzerMutate(data, size, limit < 4 * STEP ? limit : 4 * STEP);
        return size;
    }
    switch (below(8)) {
    case 0: /* a new one, of random bytes */
    case 1:
        if (size + STEP > limit)
            break;
        at = 1 + below(n);
        memmove(data + (at + 1) * STEP, data + at * STEP, size - at * STEP);
        for (i = 0; i < STEP; i++)
            data[at * STEP + i] = (uint8_t)below(256);
        return size + STEP;
    case 2: /* some are left out */
        at = 1 + below(n - 1);
        count = 1 + below(n - at < 4 ? n - at : 4);
        memmove(data + at * STEP, data + (at + count) * STEP, size - (at + count) * STEP);
        return size - count * STEP;
    case 3: /* some come twice */
        from = 1 + below(n - 1);
        count = 1 + below(n - from < 4 ? n - from : 4);
        if (size + count * STEP > limit)
            break;
        memmove(data + (from + count) * STEP, data + from * STEP, size - from * STEP);
        return size + count * STEP;
    case 4: /* two change places */
        if (n < 3)
            break;
        at = 1 + below(n - 1);
        from = 1 + below(n - 1);
        for (i = 0; i < STEP; i++) {
            uint8_t byte = data[at * STEP + i];
            data[at * STEP + i] = data[from * STEP + i];
            data[from * STEP + i] = byte;
        }
        return size;
    case 5: /* another operation with the same arguments */
        data[at * STEP] = (uint8_t)below(256);
        return size;
    case 6: /* one byte */
        data[at * STEP + below(STEP)] = (uint8_t)below(256);
        return size;
    }
    LLVMFuzzerMutate(data + at * STEP, STEP, STEP);
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t limit, unsigned int seed)
{
    size_t times;
    mutations = seed;
    for (times = 1 + below(3); times; times--)
        size = change(data, size, limit);
    return size;
}

size_t LLVMFuzzerCustomCrossOver(const uint8_t *one, size_t one_size, const uint8_t *two, size_t two_size, uint8_t *out,
                                 size_t limit, unsigned int seed)
{
    size_t head, tail;
    mutations = seed;
    head = STEP * below(one_size / STEP + 1);
    tail = STEP * below(two_size / STEP + 1);
    if (head > limit)
        head = limit;
    memcpy(out, one, head);
    if (tail > limit - head)
        tail = limit - head;
    memcpy(out + head, two + two_size - tail, tail);
    return head + tail;
}

int fuzz(int argc, char **argv, int (*run)(const uint8_t *data, size_t size))
{
    return LLVMFuzzerRunDriver(&argc, &argv, run);
}

/* --- OpenSSL's randomness: RAND_METHOD of openssl/rand.h ------------------------ */

static int give(unsigned char *buffer, int size)
{
    for (int i = 0; i < size; i++)
        buffer[i] = (unsigned char)next_of(&random_state);
    return 1;
}

static int is_there(void)
{
    return 1;
}

void begin_again(uint64_t seed)
{
    random_state = seed;
}

const struct {
    int (*seed)(const void *data, int size);
    int (*bytes)(unsigned char *buffer, int size);
    void (*cleanup)(void);
    int (*add)(const void *data, int size, double entropy);
    int (*pseudorand)(unsigned char *buffer, int size);
    int (*status)(void);
} same_again = {NULL, give, NULL, NULL, give, is_there};

/* --- OpenSSL's key derivation: openssl/kdf.h ------------------------------------ */

/*
 * HKDF and TLS 1.2's PRF, as libssl calls them, are a sixth of what an input takes, and not what it is about. Here both
 * ends get keys that depend on all that they would depend on, and can be guessed.
 */
struct parameter { /* OSSL_PARAM of openssl/core.h */
    const char *name;
    unsigned int type;
    const void *data;
    size_t size, returned;
};

static char derivation;

void *EVP_KDF_fetch(void *library, const char *algorithm, const char *properties)
{
    (void)library, (void)algorithm, (void)properties;
    return &derivation;
}

void *EVP_KDF_CTX_new(void *function)
{
    return function;
}

void EVP_KDF_free(void *function)
{
    (void)function;
}

void EVP_KDF_CTX_free(void *context)
{
    (void)context;
}

int EVP_KDF_derive(void *context, unsigned char *key, size_t size, const struct parameter *parameters)
{
    uint64_t state = size, word;
    size_t at, n;
    (void)context;
    for (; parameters->name; parameters++) {
        n = parameters->data ? parameters->size : 0;
        state = next_of(&state) ^ n;
        for (at = 0; at < n; at += sizeof word) {
            word = 0;
            memcpy(&word, (const char *)parameters->data + at, n - at < sizeof word ? n - at : sizeof word);
            state = next_of(&state) ^ word;
        }
    }
    for (at = 0; at < size; at += sizeof word) {
        word = next_of(&state);
        memcpy(key + at, &word, size - at < sizeof word ? size - at : sizeof word);
    }
    return 1;
}
