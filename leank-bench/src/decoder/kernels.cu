// What a decoder does between its matrix products and its attention.
//
// BF16 = 1: weights and what goes into products are bf16; 0: f32. The hidden state, weights of norms,
// biases and logits are f32 either way. Rows are the tokens of a step.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
struct Number {
    u16 bits;
};

__device__ __forceinline__ float widen(Number x) { return __uint_as_float(u32(x.bits) << 16); }

__device__ __forceinline__ Number narrow(float x) {
    Number y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#else
typedef float Number;

__device__ __forceinline__ float widen(Number x) { return x; }
__device__ __forceinline__ Number narrow(float x) { return x; }
#endif

// Four neighbours, in one access to memory.
struct alignas(4 * sizeof(Number)) Four {
    Number x[4];
};

constexpr u32 ALL = 0xffffffff;

// One thread block per row.
extern "C" __global__ void
embed(const Number* __restrict__ table, const u32* __restrict__ tokens, float* x, u32 hidden) {
    const Four* from = reinterpret_cast<const Four*>(table + u64(tokens[blockIdx.x]) * hidden);
    float4* to = reinterpret_cast<float4*>(x + u64(blockIdx.x) * hidden);
    for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        Four four = from[i];
        to[i] = make_float4(widen(four.x[0]), widen(four.x[1]), widen(four.x[2]), widen(four.x[3]));
    }
}

// One thread block of up to 1024 threads per row.
extern "C" __global__ void rms_norm(
    const float* __restrict__ x,
    const float* __restrict__ weight,
    Number* __restrict__ out,
    u32 hidden,
    float epsilon
) {
    __shared__ float sums[32];
    const float4* from = reinterpret_cast<const float4*>(x + u64(blockIdx.x) * hidden);
    const float4* factors = reinterpret_cast<const float4*>(weight);
    Four* to = reinterpret_cast<Four*>(out + u64(blockIdx.x) * hidden);
    float sum = 0;
    for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 v = from[i];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#pragma unroll
    for (u32 lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(ALL, sum, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
    float scale = 1.0f / sqrtf(sum / float(hidden) + epsilon);
    for (u32 i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 v = from[i], w = factors[i];
        Four four;
        four.x[0] = narrow(v.x * scale * w.x);
        four.x[1] = narrow(v.y * scale * w.y);
        four.x[2] = narrow(v.z * scale * w.z);
        four.x[3] = narrow(v.w * scale * w.w);
        to[i] = four;
    }
}

// Adds the bias where there is one, [stride], and rotates the first `rotated` heads of each row: pairs
// of channels (c, c + head_dim / 2). Grid: threads for `heads` times head_dim / 2 pairs, then rows.
extern "C" __global__ void rope(
    Number* qkv,
    const float* bias,
    const float* __restrict__ cosines,
    const float* __restrict__ sines,
    const u32* __restrict__ positions,
    u32 heads,
    u32 rotated,
    u32 head_dim,
    u32 stride
) {
    u32 half = head_dim / 2;
    u32 pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= heads * half) return;
    u32 head = pair / half, channel = pair % half;
    u32 at = head * head_dim + channel;
    Number* low = qkv + u64(blockIdx.y) * stride + at;
    Number* high = low + half;
    float a = widen(*low), b = widen(*high);
    if (bias) {
        a += bias[at];
        b += bias[at + half];
    }
    if (head < rotated) {
        u64 angle = u64(positions[blockIdx.y]) * half + channel;
        float cosine = cosines[angle], sine = sines[angle];
        float turned = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = turned;
    }
    *low = narrow(a);
    *high = narrow(b);
}

// silu(gate) * up; rows are gate, then up, `width` of each. Grid: threads for width / 4, then rows.
extern "C" __global__ void
swiglu(const Number* __restrict__ gate_up, Number* __restrict__ out, u32 width) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width / 4) return;
    const Four* from = reinterpret_cast<const Four*>(gate_up + u64(blockIdx.y) * 2 * width);
    Four gate = from[i], up = from[width / 4 + i], inner;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        float x = widen(gate.x[j]);
        inner.x[j] = narrow(x / (1.0f + expf(-x)) * widen(up.x[j]));
    }
    reinterpret_cast<Four*>(out + u64(blockIdx.y) * width)[i] = inner;
}

// The token with the largest logit of each row, the first of equals, and the position after, up to
// `last`. One thread block of 1024 threads per row.
extern "C" __global__ void __launch_bounds__(1024)
argmax(const float* __restrict__ logits, u32* tokens, u32* positions, u32 vocabulary, u32 last) {
    __shared__ float values[32];
    __shared__ u32 indices[32];
    const float* row = logits + u64(blockIdx.x) * vocabulary;
    float best = -__int_as_float(0x7f800000);
    u32 index = 0xffffffff;
    auto take = [&](float value, u32 at) {
        if (value > best || (value == best && at < index)) {
            best = value;
            index = at;
        }
    };
#pragma unroll 8
    for (u32 i = threadIdx.x; i < vocabulary; i += 1024) take(row[i], i);
    auto reduce = [&] {
#pragma unroll
        for (u32 lane = 16; lane > 0; lane /= 2) {
            float value = __shfl_xor_sync(ALL, best, lane);
            take(value, __shfl_xor_sync(ALL, index, lane));
        }
    };
    reduce();
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = best;
        indices[threadIdx.x / 32] = index;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = values[threadIdx.x];
    index = indices[threadIdx.x];
    reduce();
    if (threadIdx.x == 0) {
        // Of logits that are all NaN none is the largest.
        tokens[blockIdx.x] = min(index, vocabulary - 1);
        positions[blockIdx.x] = min(positions[blockIdx.x] + 1, last);
    }
}
