// The dtypes that the kernels read and write; they compute in float32.

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

float widen(float v) { return v; }
float widen(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
float widen(float16 v) {
    // exponent and mantissa in float32's places, then a product that moves the exponent and mends subnormal numbers
    uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16;
    float wide;
    memcpy(&wide, &magnitude, 4);
    wide *= 0x1p112f;
    memcpy(&magnitude, &wide, 4);
    magnitude |= sign | ((v.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    memcpy(&wide, &magnitude, 4);
    return wide;
}

void narrow(float v, float *to) { *to = v; }
void narrow(float v, bfloat16 *to) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void narrow(float v, float16 *to) {
    uint32_t bits, sign;
    memcpy(&bits, &v, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
        half = 0x7e00;
    } else if (bits >= 0x477ff000) {  // rounds to more than 65504
        half = 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: let float32's own addition round to a multiple of 2^-24
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&half, &small, 4);
        half -= 0x3f000000;
    } else {
        half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    to->bits = uint16_t(half | sign);
}

}  // namespace
