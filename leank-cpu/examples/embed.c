/* The loop of a C runtime that keeps its KV cache in leank. It checks itself: tools/capi.sh. */
#include <leank.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 4, QUERY_HEADS = 8, KV_HEADS = 2, HEADS = LAYERS * KV_HEADS, HEAD_DIM = 64 };
enum { KEPT = 22, SINK = 32, RECENT = 128, BLOCK = 64, PROMPT = 4000, STEPS = 100 };
enum { KEY, VALUE, QUERY };

static float k[PROMPT * KV_HEADS * HEAD_DIM], v[PROMPT * KV_HEADS * HEAD_DIM];
static float q[QUERY_HEADS * HEAD_DIM], out[QUERY_HEADS * HEAD_DIM];

static void check(leank_status status)
{
    if (status == LEANK_OK) return;
    fprintf(stderr, "%s: %s\n", leank_status_name(status), leank_last_error());
    exit(1);
}

/* Stands for what the runtime computes: K, V and q after RoPE. */
static float activation(int kind, size_t layer, size_t token, size_t i)
{
    uint32_t x = (uint32_t)(((token * LAYERS + layer) * 3 + (size_t)kind) * 4096 + i);
    x = (x ^ x >> 15) * 2246822519u;
    x = (x ^ x >> 13) * 3266489917u;
    return (float)((x ^ x >> 16) % 129) / 64 - 1;
}

static void compute(float *to, int kind, size_t layer, size_t start, size_t tokens, size_t row)
{
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < row; i++) to[t * row + i] = activation(kind, layer, start + t, i);
}

/* What attention means, in double precision: the largest error of `out`. */
static double error_of(size_t layer, size_t position)
{
    static double weights[PROMPT + STEPS];
    double worst = 0;
    for (size_t head = 0; head < QUERY_HEADS; head++) {
        size_t first = head / (QUERY_HEADS / KV_HEADS) * HEAD_DIM;
        double total = 0;
        for (size_t token = 0; token <= position; token++) {
            size_t block = token / BLOCK, sinks = (SINK + BLOCK - 1) / BLOCK;
            int lean = block >= sinks && (block + 1) * BLOCK + RECENT <= position + 1;
            double logit = 0;
            for (size_t c = 0; c < HEAD_DIM; c += lean ? 3 : 1)
                logit += (double)q[head * HEAD_DIM + c] * activation(KEY, layer, token, first + c);
            total += weights[token] = exp(logit / sqrt((double)HEAD_DIM));
        }
        for (size_t c = 0; c < HEAD_DIM; c++) {
            double sum = 0;
            for (size_t token = 0; token <= position; token++)
                sum += weights[token] * activation(VALUE, layer, token, first + c);
            worst = fmax(worst, fabs(sum / total - out[head * HEAD_DIM + c]));
        }
    }
    return worst;
}

int main(void)
{
    /* A mask comes from a file (leank_mask_read); here every head keeps every third channel. */
    uint32_t counts[HEADS];
    uint16_t channels[HEADS * KEPT];
    for (size_t i = 0; i < HEADS; i++) counts[i] = KEPT;
    for (size_t i = 0; i < HEADS * KEPT; i++) channels[i] = (uint16_t)(i % KEPT * 3);
    leank_kept kept = {LAYERS, KV_HEADS, HEAD_DIM, counts, HEADS, channels, HEADS * KEPT};
    leank_mask *mask;
    check(leank_mask_create(&kept, &mask));

    leank_backend_options options;
    leank_backend *backend;
    check(leank_backend_options_init(&options, sizeof options));
    options.threads = 2;
    check(leank_backend_create(&options, &backend));

    leank_config config;
    leank_cache *cache;
    check(leank_config_init(&config, sizeof config));
    config.layers = LAYERS, config.query_heads = QUERY_HEADS, config.kv_heads = KV_HEADS;
    config.head_dim = HEAD_DIM, config.mask = mask;
    config.sink = SINK, config.recent = RECENT, config.block = BLOCK;
    check(leank_cache_create(backend, &config, &cache));

    leank_sequence sequence;
    check(leank_cache_add_sequence(cache, &sequence));

    /* The prompt, whose attention the runtime computes itself, then tokens one by one. */
    double worst = 0;
    for (size_t start = 0; start < PROMPT + STEPS; start += start ? 1 : PROMPT) {
        size_t tokens = start ? 1 : PROMPT;
        leank_entry entry = {sequence, tokens, start > 0};
        check(leank_cache_plan(cache, &entry, 1));
        for (size_t layer = 0; layer < LAYERS; layer++) {
            compute(k, KEY, layer, start, tokens, KV_HEADS * HEAD_DIM);
            compute(v, VALUE, layer, start, tokens, KV_HEADS * HEAD_DIM);
            leank_view key = leank_contiguous(k, LEANK_F32, tokens, KV_HEADS, HEAD_DIM);
            leank_view value = leank_contiguous(v, LEANK_F32, tokens, KV_HEADS, HEAD_DIM);
            check(leank_cache_append(cache, layer, &key, &value));
            if (!entry.attend) continue;
            compute(q, QUERY, layer, start, 1, QUERY_HEADS * HEAD_DIM);
            leank_view query = leank_contiguous(q, LEANK_F32, 1, QUERY_HEADS, HEAD_DIM);
            leank_view_mut output = leank_contiguous_mut(out, LEANK_F32, 1, QUERY_HEADS, HEAD_DIM);
            check(leank_cache_attend(cache, layer, &query, &output));
            if (start == PROMPT + STEPS - 1) worst = fmax(worst, error_of(layer, start));
        }
        check(leank_cache_commit(cache));
    }

    leank_memory memory;
    check(leank_cache_memory(cache, &memory, sizeof memory));
    double used = (double)(memory.full_bytes + memory.lean_bytes);
    printf("%s: %.0f tokens in %.0f bytes, %.3f of a dense cache; largest error %.1e\n",
           leank_backend_name(backend), (double)memory.tokens, used,
           used / (double)memory.dense_bytes, worst);
    leank_cache_free(cache);
    leank_backend_free(backend);
    leank_mask_free(mask);
    return worst < 1e-5 ? 0 : 1;
}
