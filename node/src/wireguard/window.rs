//! Which counters of a session have been seen, so that no packet counts twice (RFC 6479).

const WORD: u64 = 64;
const WORDS: usize = 128;
/// How far a packet may come behind the latest, as in Linux. One word is always being cleared.
const SIZE: u64 = (WORDS as u64 - 1) * WORD;

/// The counters up to the latest.
#[derive(Clone, Debug)]
pub struct Window {
    /// One more than the latest counter.
    next: u64,
    seen: Box<[u64; WORDS]>,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            next: 0,
            seen: Box::new([0; WORDS]),
        }
    }
}

impl Window {
    /// Whether a packet with this counter may be new: to be asked before it is decrypted.
    pub fn may_be_new(&self, counter: u64) -> bool {
        if counter >= self.next {
            return counter < u64::MAX;
        }
        self.next - counter <= SIZE && self.word(counter) & bit(counter) == 0
    }

    /// Takes the counter of a packet that was authentic. Returns whether it is new.
    pub fn take(&mut self, counter: u64) -> bool {
        if !self.may_be_new(counter) {
            return false;
        }
        if counter >= self.next {
            // Words between the latest and this one hold what was seen a whole window ago.
            let (first, last) = (self.next.div_ceil(WORD), counter / WORD);
            for word in (first..=last).rev().take(WORDS) {
                self.seen[word as usize % WORDS] = 0;
            }
            self.next = counter + 1;
        }
        self.seen[(counter / WORD) as usize % WORDS] |= bit(counter);
        true
    }

    fn word(&self, counter: u64) -> u64 {
        self.seen[(counter / WORD) as usize % WORDS]
    }
}

fn bit(counter: u64) -> u64 {
    1 << (counter % WORD)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_each_counter_once_and_none_from_long_ago() {
        let mut window = Window::default();
        assert!(window.take(0));
        assert!(!window.take(0));
        assert!(window.take(SIZE + 5));
        assert!(!window.may_be_new(5), "too long ago");
        assert!(window.take(6));
        assert!(!window.take(6));
        assert!(!window.may_be_new(u64::MAX), "never sent");
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(counters in prop::collection::vec(prop_oneof![0..300u64, 0..40_000u64], 0..400)) {
            let mut window = Window::default();
            let mut seen = HashSet::new();
            let mut latest = None;
            for counter in counters {
                let long_ago = latest.is_some_and(|latest: u64| latest + 1 > counter + SIZE);
                let new = !long_ago && !seen.contains(&counter);
                prop_assert_eq!(window.may_be_new(counter), new);
                prop_assert_eq!(window.take(counter), new);
                if new {
                    seen.insert(counter);
                    latest = latest.max(Some(counter));
                }
            }
        }
    }
}
