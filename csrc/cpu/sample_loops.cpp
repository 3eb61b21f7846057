// The loops of sample.h, compiled once for every instruction set.
#include <math.h>

#include "lanes.h"
#include "sample.h"
#include "simd.h"

namespace glm4 {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline Ints key_of(Floats score) {
    const Ints bits = Ints(score + 0.0f);  // no -0, which would stand below 0
    const Ints key = bits ^ ((bits >> 31) & 0x7fffffff);
    return score == score ? key : Ints{} + 0x7fffffff;
}

template <DType TYPE>
static inline Ints keys_at(const char* logits, const uint8_t* seen, float penalty, int count) {
    Floats score = load<TYPE>(logits, count);
    if (seen) {
        Bytes bytes = {};
        memcpy(&bytes, seen, count);
        const Floats penalised = score < 0.0f ? score * penalty : score / penalty;
        score = __builtin_convertvector(bytes, Ints) != 0 ? penalised : score;
    }
    return key_of(score);
}

// run(column in the block, keys, count of them) for every vector of a block.
template <DType TYPE, typename Run>
static inline void for_each_key(const Sample& sample, int64_t row, int64_t block, const Run& run) {
    const int64_t begin = block * SAMPLE_BLOCK, left = sample.n_cols - begin;
    const char* logits = sample.logits + (row * sample.stride + begin) * ITEM<TYPE>;
    const uint8_t* seen = sample.seen ? sample.seen + row * sample.stride_seen + begin : nullptr;
    const auto at = [&](int64_t i, int count) {
        const uint8_t* marks = seen ? seen + i : nullptr;
        run(i, keys_at<TYPE>(logits + i * ITEM<TYPE>, marks, sample.penalty, count), count);
    };
    if (left >= SAMPLE_BLOCK) {
        for (int64_t i = 0; i < SAMPLE_BLOCK; i += LANES) at(i, LANES);
    } else {
        for_each_piece(left, at);
    }
}

template <DType TYPE>
static void keys_of_block(const Sample& sample, int64_t row, int64_t block, int32_t* keys) {
    for (int i = 0; i < SAMPLE_BLOCK; ++i) keys[i] = KEY_OF_MINUS_INF;
    for_each_key<TYPE>(sample, row, block, [&](int64_t i, Ints found, int count) {
        memcpy(keys + i, &found, 4 * count);
    });
}

template <DType TYPE>
static void maxima_of_blocks(const Sample& sample, int64_t begin, int64_t end, int32_t* maxima) {
    const int64_t n_blocks = sample.n_blocks();
    for (int64_t i = begin; i < end; ++i) {
        Ints most = Ints{} + KEY_OF_MINUS_INF;
        for_each_key<TYPE>(sample, i / n_blocks, i % n_blocks, [&](int64_t, Ints keys, int count) {
            for (int lane = count; lane < LANES; ++lane) keys[lane] = KEY_OF_MINUS_INF;
            most = keys > most ? keys : most;
        });
        int32_t lanes[LANES];
        memcpy(lanes, &most, sizeof(lanes));
        maxima[i] = lanes[0];
        for (int lane = 1; lane < LANES; ++lane) {
            maxima[i] = lanes[lane] > maxima[i] ? lanes[lane] : maxima[i];
        }
    }
}

// 2^30 times the polynomial, and by how much to shift: mass = (mantissa << 14) >> shift.
static inline void exponential(Ints keys, float largest, float scale, Ints* mantissa, Ints* shift) {
    const Floats zero = {}, magic = zero + 12582912.0f;  // 1.5 * 2^23: rounds half to even
    const Floats score = Floats(keys ^ ((keys >> 31) & 0x7fffffff));
    const Floats x = larger((score - largest) * scale, zero - 63.0f);
    const Floats shifted = x + magic, f = x - (shifted - magic);
    Floats power = f * 0.00015353361959569156f + 0.0013398875016719103f;
    power = power * f + 0.00961843691766262f;
    power = power * f + 0.055503323674201965f;
    power = power * f + 0.24022647738456726f;
    power = power * f + 0.6931471824645996f;
    power = power * f + 1.0f;
    *mantissa = __builtin_convertvector(power * 1073741824.0f, Ints);
    *shift = Ints(magic) - Ints(shifted);
}

static void masses_of(const int32_t* keys, int64_t n, float largest, float scale, int64_t* masses) {
    for (int64_t begin = 0; begin < n; begin += SAMPLE_BLOCK) {
        int32_t mantissas[SAMPLE_BLOCK], shifts[SAMPLE_BLOCK];
        for (int i = 0; i < SAMPLE_BLOCK; i += LANES) {
            Ints key, mantissa, shift;
            memcpy(&key, keys + begin + i, sizeof(key));
            exponential(key, largest, scale, &mantissa, &shift);
            memcpy(mantissas + i, &mantissa, sizeof(mantissa));
            memcpy(shifts + i, &shift, sizeof(shift));
        }
        for (int i = 0; i < SAMPLE_BLOCK; ++i) {
            masses[begin + i] = int64_t(uint64_t(mantissas[i]) << 14 >> shifts[i]);
        }
    }
}

static void keys_of(const Sample& sample, int64_t row, int64_t block, int32_t* keys) {
    if (sample.dtype == DType::bfloat16) {
        return keys_of_block<DType::bfloat16>(sample, row, block, keys);
    }
    if (sample.dtype == DType::float16) {
        return keys_of_block<DType::float16>(sample, row, block, keys);
    }
    keys_of_block<DType::float32>(sample, row, block, keys);
}

static void maxima_of(const Sample& sample, int64_t begin, int64_t end, int32_t* maxima) {
    if (sample.dtype == DType::bfloat16) {
        return maxima_of_blocks<DType::bfloat16>(sample, begin, end, maxima);
    }
    if (sample.dtype == DType::float16) {
        return maxima_of_blocks<DType::float16>(sample, begin, end, maxima);
    }
    maxima_of_blocks<DType::float32>(sample, begin, end, maxima);
}

SampleLoops GLM4_VARIANT_NAME(sample_loops)() { return {keys_of, maxima_of, masses_of}; }

}  // namespace glm4
