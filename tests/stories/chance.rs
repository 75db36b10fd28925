//! Pseudo-random choices that a seed repeats: `./check --soak` sets where they begin and how many there are.

/// The number in the variable `name`.
pub(crate) fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// How often a story repeats what it draws lots for.
pub(crate) fn rounds(otherwise: u64) -> u32 {
    u32::try_from(setting("ANYWHEN_SOAK_ROUNDS", otherwise)).unwrap()
}

/// How often a story repeats what a soak does `full` times: a tenth of that otherwise.
pub(crate) fn tenth_of(full: u32) -> u32 {
    if rounds(0) == 0 { full / 10 } else { full }
}

pub(crate) struct Chance {
    state: u64,
}

impl Chance {
    pub(crate) fn new() -> Self {
        Self {
            state: setting("ANYWHEN_SEED", 1).max(1),
        }
    }

    /// The lots of one of several that draw beside each other.
    pub(crate) fn of(seed: u64) -> Self {
        // numbers that differ in a few bits alone would begin alike
        let state = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self {
            state: state.max(1),
        }
    }

    /// A number below `bound`: one step of xorshift64.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }
}
