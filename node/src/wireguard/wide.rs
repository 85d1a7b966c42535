//! ChaCha20-Poly1305 of sixteen packets side by side (RFC 8439), for CPUs with AVX-512.
//!
//! A burst becomes a train of equally long packets, so lane `i` of every vector belongs to packet
//! `i`: ChaCha20 then needs no shuffle but one transposition of its key stream, and Poly1305 no
//! powers of its key and no sum over lanes. Nothing here branches on a secret or looks anything up by
//! one. What it makes is what `ring` makes, to which the session's tests hold it at every length.

use std::{arch::x86_64::*, ops::Range};

use zeroize::Zeroizing;

use super::{HEADER, TAG};

const LANES: usize = 16;

/// A key on a CPU that can do it.
pub struct Key(Zeroizing<[u32; 8]>);

impl Key {
    /// `None`: this CPU cannot.
    pub fn new(bytes: &[u8; 32]) -> Option<Self> {
        let able = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512ifma");
        let mut words = Zeroizing::new([0; 8]);
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        able.then_some(Self(words))
    }

    /// Seals 1 to 16 packets of one length in place. Each range of `bytes` is a datagram: a header,
    /// the packet, and room for its tag. The first has the nonce `counter`.
    pub fn seal(&self, counter: u64, bytes: &mut [u8], datagrams: &[Range<usize>]) {
        let len = datagrams[0].len() - HEADER - TAG;
        let mut counters = [0; LANES];
        let mut places = [std::ptr::null_mut(); LANES];
        for lane in 0..LANES {
            // Lanes without a packet of their own read the first and write nothing.
            let own = datagrams.get(lane);
            counters[lane] = counter + own.map_or(0, |_| lane as u64);
            let packet = &mut bytes[own.unwrap_or(&datagrams[0]).clone()][HEADER..];
            assert_eq!(packet.len(), len + TAG);
            places[lane] = packet.as_mut_ptr();
        }
        let used = datagrams.len();
        let from = places.map(<*mut u8>::cast_const);
        // SAFETY: a `Key` exists only on a CPU that can; each place has `len` bytes of `bytes`.
        let tags = unsafe { run::<false>(&self.0, &counters, &from, &places, used, len) };
        for (range, tag) in datagrams.iter().zip(tags) {
            bytes[range.end - TAG..range.end].copy_from_slice(&tag);
        }
    }

    /// Opens 1 to 16 packets of one length, each a range of `sealed` with its tag at its end, and
    /// puts them into `plain` one behind the other. Returns a bit for each that is authentic.
    pub fn open(
        &self,
        counters: &[u64],
        sealed: &[u8],
        packets: &[Range<usize>],
        plain: &mut [u8],
    ) -> u32 {
        let used = packets.len();
        let len = packets[0].len() - TAG;
        let mut nonces = [0; LANES];
        nonces[..used].copy_from_slice(counters);
        let mut from = [std::ptr::null(); LANES];
        let mut to = [std::ptr::null_mut(); LANES];
        let plain = &mut plain[..used * len];
        for lane in 0..LANES {
            let packet = &sealed[packets.get(lane).unwrap_or(&packets[0]).clone()];
            assert_eq!(packet.len(), len + TAG);
            from[lane] = packet.as_ptr();
            if lane < used {
                to[lane] = plain[lane * len..].as_mut_ptr();
            }
        }
        // SAFETY: a `Key` exists only on a CPU that can; each `from` has `len` bytes of `sealed`, and
        // each `to` that is written `len` of `plain`.
        let tags = unsafe { run::<true>(&self.0, &nonces, &from, &to, used, len) };
        let mut authentic = 0;
        for (lane, (range, tag)) in packets.iter().zip(tags).enumerate() {
            let claimed = &sealed[range.end - TAG..range.end];
            let difference = claimed.iter().zip(tag).fold(0, |sum, (a, b)| sum | (a ^ b));
            authentic |= u32::from(difference == 0) << lane;
        }
        authentic
    }
}

const MASK44: i64 = (1 << 44) - 1;
const MASK42: i64 = (1 << 42) - 1;

type Words = [__m512i; 16];

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn quarter(v: &mut Words, a: usize, b: usize, c: usize, d: usize) {
    v[a] = _mm512_add_epi32(v[a], v[b]);
    v[d] = _mm512_rol_epi32::<16>(_mm512_xor_si512(v[d], v[a]));
    v[c] = _mm512_add_epi32(v[c], v[d]);
    v[b] = _mm512_rol_epi32::<12>(_mm512_xor_si512(v[b], v[c]));
    v[a] = _mm512_add_epi32(v[a], v[b]);
    v[d] = _mm512_rol_epi32::<8>(_mm512_xor_si512(v[d], v[a]));
    v[c] = _mm512_add_epi32(v[c], v[d]);
    v[b] = _mm512_rol_epi32::<7>(_mm512_xor_si512(v[b], v[c]));
}

/// Word `w` of block `v[12]` of every lane's key stream.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn chacha(initial: &Words) -> Words {
    let mut v = *initial;
    for _ in 0..10 {
        quarter(&mut v, 0, 4, 8, 12);
        quarter(&mut v, 1, 5, 9, 13);
        quarter(&mut v, 2, 6, 10, 14);
        quarter(&mut v, 3, 7, 11, 15);
        quarter(&mut v, 0, 5, 10, 15);
        quarter(&mut v, 1, 6, 11, 12);
        quarter(&mut v, 2, 7, 8, 13);
        quarter(&mut v, 3, 4, 9, 14);
    }
    for (word, first) in v.iter_mut().zip(initial) {
        *word = _mm512_add_epi32(*word, *first);
    }
    v
}

/// From a vector for each word to a vector for each lane.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn transpose_words(v: &Words) -> Words {
    let mut pairs = *v;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    // In every 128-bit quarter q: words 4k.. of lane 4q + j, at quads[4k + j].
    let mut quads = pairs;
    for k in (0..16).step_by(4) {
        quads[k] = _mm512_unpacklo_epi64(pairs[k], pairs[k + 2]);
        quads[k + 1] = _mm512_unpackhi_epi64(pairs[k], pairs[k + 2]);
        quads[k + 2] = _mm512_unpacklo_epi64(pairs[k + 1], pairs[k + 3]);
        quads[k + 3] = _mm512_unpackhi_epi64(pairs[k + 1], pairs[k + 3]);
    }
    let mut lanes = quads;
    for j in 0..4 {
        let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
        let ab_low = _mm512_shuffle_i32x4::<0x88>(a, b); // a0 a2 b0 b2
        let ab_high = _mm512_shuffle_i32x4::<0xdd>(a, b); // a1 a3 b1 b3
        let cd_low = _mm512_shuffle_i32x4::<0x88>(c, d);
        let cd_high = _mm512_shuffle_i32x4::<0xdd>(c, d);
        lanes[j] = _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low); // a0 b0 c0 d0
        lanes[8 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low); // a2 b2 c2 d2
        lanes[4 + j] = _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high);
        lanes[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high);
    }
    lanes
}

/// From eight packets' 64 bytes to vectors of each of their eight 64-bit words.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn transpose_quads(v: &[__m512i]) -> [__m512i; 8] {
    let mut pairs = [_mm512_setzero_si512(); 8];
    for i in (0..8).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]); // words 0 2 4 6 of lanes i, i+1
        pairs[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]); // words 1 3 5 7
    }
    let mut words = pairs;
    for j in 0..2 {
        let [a, b, c, d] = [pairs[j], pairs[2 + j], pairs[4 + j], pairs[6 + j]];
        let ab_low = _mm512_shuffle_i32x4::<0x88>(a, b);
        let ab_high = _mm512_shuffle_i32x4::<0xdd>(a, b);
        let cd_low = _mm512_shuffle_i32x4::<0x88>(c, d);
        let cd_high = _mm512_shuffle_i32x4::<0xdd>(c, d);
        words[j] = _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low);
        words[4 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low);
        words[2 + j] = _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high);
        words[6 + j] = _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high);
    }
    words
}

/// Poly1305 of eight packets, in limbs of 44, 44 and 42 bits.
#[derive(Clone, Copy)]
struct Poly {
    h: [__m512i; 3],
    r: [__m512i; 3],
    /// 20 times r1 and r2: what passes 2^132 comes back as 5 times 4.
    wrapped: [__m512i; 2],
    s: [__m512i; 2],
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn limbs(low: __m512i, high: __m512i) -> [__m512i; 3] {
    let mask = _mm512_set1_epi64(MASK44);
    [
        _mm512_and_si512(low, mask),
        _mm512_and_si512(
            _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(high)),
            mask,
        ),
        _mm512_srli_epi64::<24>(high),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn twenty_times(x: __m512i) -> __m512i {
    _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x))
}

impl Poly {
    /// `key` is the first 32 bytes of a lane's key stream, as four 64-bit words.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    #[inline]
    fn new(key: [__m512i; 4]) -> Self {
        let r = limbs(
            _mm512_and_si512(key[0], _mm512_set1_epi64(0x0fff_fffc_0fff_ffff)),
            _mm512_and_si512(key[1], _mm512_set1_epi64(0x0fff_fffc_0fff_fffc)),
        );
        Self {
            h: [_mm512_setzero_si512(); 3],
            r,
            wrapped: [twenty_times(r[1]), twenty_times(r[2])],
            s: [key[2], key[3]],
        }
    }

    /// Takes the next 16 bytes of each packet.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    #[inline]
    fn block(&mut self, low: __m512i, high: __m512i) {
        let m = limbs(low, high);
        let h0 = _mm512_add_epi64(self.h[0], m[0]);
        let h1 = _mm512_add_epi64(self.h[1], m[1]);
        let h2 = _mm512_add_epi64(self.h[2], _mm512_or_si512(m[2], _mm512_set1_epi64(1 << 40)));
        let [r0, r1, r2] = self.r;
        let [w1, w2] = self.wrapped;
        let zero = _mm512_setzero_si512();
        let product = |a: __m512i, b: __m512i, c: __m512i| {
            let low = _mm512_madd52lo_epu64(zero, h0, a);
            let low2 = _mm512_madd52lo_epu64(zero, h1, b);
            let low = _mm512_madd52lo_epu64(low, h2, c);
            let high = _mm512_madd52hi_epu64(zero, h0, a);
            let high2 = _mm512_madd52hi_epu64(zero, h1, b);
            let high = _mm512_madd52hi_epu64(high, h2, c);
            (_mm512_add_epi64(low, low2), _mm512_add_epi64(high, high2))
        };
        let (low0, high0) = product(r0, w2, w1);
        let (low1, high1) = product(r1, r0, w2);
        let (low2, high2) = product(r2, r1, r0);
        let mask = _mm512_set1_epi64(MASK44);
        // What is above bit 52 of one limb is above bit 8 of the next.
        let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(low0), _mm512_slli_epi64::<8>(high0));
        let low1 = _mm512_add_epi64(low1, carry);
        let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(low1), _mm512_slli_epi64::<8>(high1));
        let low2 = _mm512_add_epi64(low2, carry);
        let carry = _mm512_add_epi64(
            _mm512_srli_epi64::<42>(low2),
            _mm512_slli_epi64::<10>(high2),
        );
        let carry = _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry));
        let low0 = _mm512_add_epi64(_mm512_and_si512(low0, mask), carry);
        self.h[0] = _mm512_and_si512(low0, mask);
        self.h[1] = _mm512_add_epi64(_mm512_and_si512(low1, mask), _mm512_srli_epi64::<44>(low0));
        self.h[2] = _mm512_and_si512(low2, _mm512_set1_epi64(MASK42));
    }

    /// The tags' two halves.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    #[inline]
    fn finish(self) -> [[u64; 8]; 2] {
        let mask44 = _mm512_set1_epi64(MASK44);
        let mask42 = _mm512_set1_epi64(MASK42);
        let [mut h0, mut h1, mut h2] = self.h;
        for _ in 0..2 {
            h2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(h1));
            h1 = _mm512_and_si512(h1, mask44);
            let carry = _mm512_srli_epi64::<42>(h2);
            h2 = _mm512_and_si512(h2, mask42);
            h0 = _mm512_add_epi64(h0, _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry)));
            h1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(h0));
            h0 = _mm512_and_si512(h0, mask44);
        }
        h2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(h1));
        h1 = _mm512_and_si512(h1, mask44);
        // Less p, where it is not less than p: then adding 5 passes 2^130.
        let g0 = _mm512_add_epi64(h0, _mm512_set1_epi64(5));
        let g1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(g0));
        let g2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(g1));
        let past = _mm512_cmpgt_epu64_mask(g2, mask42);
        let h0 = _mm512_mask_and_epi64(h0, past, g0, mask44);
        let h1 = _mm512_mask_and_epi64(h1, past, g1, mask44);
        let h2 = _mm512_mask_and_epi64(h2, past, g2, mask42);
        let low = _mm512_or_si512(h0, _mm512_slli_epi64::<44>(h1));
        let high = _mm512_or_si512(_mm512_srli_epi64::<20>(h1), _mm512_slli_epi64::<24>(h2));
        let low = _mm512_add_epi64(low, self.s[0]);
        let high = _mm512_add_epi64(high, self.s[1]);
        let carry = _mm512_cmplt_epu64_mask(low, self.s[0]);
        let high = _mm512_mask_add_epi64(high, carry, high, _mm512_set1_epi64(1));
        let mut tags = [[0; 8]; 2];
        // SAFETY: each is 64 bytes.
        unsafe {
            _mm512_storeu_si512(tags[0].as_mut_ptr().cast(), low);
            _mm512_storeu_si512(tags[1].as_mut_ptr().cast(), high);
        }
        tags
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
#[inline]
fn lane_quad(low: __m512i, high: __m512i, upper: bool) -> __m512i {
    let half = |v: __m512i| match upper {
        false => _mm512_cvtepu32_epi64(_mm512_castsi512_si256(v)),
        true => _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64::<1>(v)),
    };
    _mm512_or_si512(half(low), _mm512_slli_epi64::<32>(half(high)))
}

/// Encrypts or decrypts `len` bytes from each `from` to each `to`, and returns the tags of what is
/// encrypted. `from[i]` and `to[i]` may be the same.
///
/// # Safety
/// The CPU has these features; `len` bytes may be read at each `from`, and written at each of the
/// first `used` of `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
unsafe fn run<const OPEN: bool>(
    key: &[u32; 8],
    counters: &[u64; LANES],
    from: &[*const u8; LANES],
    to: &[*mut u8; LANES],
    used: usize,
    len: usize,
) -> [[u8; 16]; LANES] {
    let mut state = [_mm512_setzero_si512(); 16];
    for (word, text) in state
        .iter_mut()
        .zip([0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574])
    {
        *word = _mm512_set1_epi32(text);
    }
    for (word, key) in state[4..].iter_mut().zip(key) {
        *word = _mm512_set1_epi32(*key as i32);
    }
    let low = counters.map(|counter| counter as u32);
    let high = counters.map(|counter| (counter >> 32) as u32);
    // SAFETY: each is 64 bytes.
    unsafe {
        state[14] = _mm512_loadu_si512(low.as_ptr().cast());
        state[15] = _mm512_loadu_si512(high.as_ptr().cast());
    }
    let one_time = chacha(&state);
    let quads = |upper| {
        [
            lane_quad(one_time[0], one_time[1], upper),
            lane_quad(one_time[2], one_time[3], upper),
            lane_quad(one_time[4], one_time[5], upper),
            lane_quad(one_time[6], one_time[7], upper),
        ]
    };
    let mut polys = [Poly::new(quads(false)), Poly::new(quads(true))];
    let mut at = 0;
    while at < len {
        let here = (len - at).min(64);
        let mask = u64::MAX >> (64 - here);
        state[12] = _mm512_add_epi32(state[12], _mm512_set1_epi32(1));
        let stream = transpose_words(&chacha(&state));
        let mut sealed = stream;
        for i in 0..LANES {
            // SAFETY: the caller's promise; what is masked out is not touched.
            unsafe {
                let text = _mm512_maskz_loadu_epi8(mask, from[i].add(at).cast());
                let other = _mm512_xor_si512(text, stream[i]);
                sealed[i] = if OPEN {
                    text
                } else {
                    _mm512_maskz_mov_epi8(mask, other)
                };
                if i < used {
                    _mm512_mask_storeu_epi8(to[i].add(at).cast(), mask, other);
                }
            }
        }
        let a = transpose_quads(&sealed[..8]);
        let b = transpose_quads(&sealed[8..]);
        for block in 0..here.div_ceil(16) {
            polys[0].block(a[2 * block], a[2 * block + 1]);
            polys[1].block(b[2 * block], b[2 * block + 1]);
        }
        at += here;
    }
    let mut tags = [[0; 16]; LANES];
    for (group, mut poly) in polys.into_iter().enumerate() {
        poly.block(_mm512_setzero_si512(), _mm512_set1_epi64(len as i64));
        let [low, high] = poly.finish();
        for lane in 0..8 {
            let tag = &mut tags[8 * group + lane];
            tag[..8].copy_from_slice(&low[lane].to_le_bytes());
            tag[8..].copy_from_slice(&high[lane].to_le_bytes());
        }
    }
    tags
}
