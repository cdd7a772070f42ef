// Random activations, and a plain read of memory.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ u32 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return u32((x ^ (x >> 31)) >> 32);
}

// Uniform numbers in +-sqrt(3), never 0: mean 0, variance 1.
__device__ float number(u64 seed, u64 index) {
    float unit = (float(mix(seed * 0x9e3779b97f4a7c15ull + index) >> 9) + 0.5f) / 8388608.0f;
    return (unit - 0.5f) * 3.4641016f;
}

extern "C" __global__ void noise_f16(unsigned short* out, u64 count, u64 seed, float scale) {
    u64 step = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned short x;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x) : "f"(scale * number(seed, i)));
        out[i] = x;
    }
}

extern "C" __global__ void noise_bf16(unsigned short* out, u64 count, u64 seed, float scale) {
    u64 step = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned short x;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x) : "f"(scale * number(seed, i)));
        out[i] = x;
    }
}

// Reads `count` times 16 bytes.
extern "C" __global__ void read(const uint4* data, u64 count, u32* out) {
    u32 sum = 0;
    u64 step = u64(gridDim.x) * blockDim.x;
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + 7 * step < count; i += 8 * step) {
        uint4 x[8];
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = __ldcs(data + i + j * step);
#pragma unroll
        for (u32 j = 0; j < 8; j++) sum ^= x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
    }
    for (; i < count; i += step) {
        uint4 x = data[i];
        sum ^= x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum == 0x12345677u) *out = sum;
}
