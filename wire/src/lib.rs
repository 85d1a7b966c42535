//! What a Tailscale node, its coordination server and its relays say to each other.
//!
//! Codecs and types only: nothing here opens a socket or reads a clock. The node speaks one side
//! of each protocol and the control server the other, so both build on this crate.
//!
//! | module | what | source |
//! |---|---|---|
//! | [`tailcfg`] | JSON of `/machine/register`, `/machine/map`, `/key` | tailcfg/tailcfg.go |
//! | [`noise`] | ts2021: the encrypted channel under HTTP/2 | control/controlbase |
//! | [`disco`] | path discovery between peers | disco/disco.go |
//! | [`derp`] | the relay's frames | derp/derp.go |
//! | [`lock`] | tailnet lock: the chain of trust, and nodes' signatures | tka |
//! | [`stun`] | binding requests and responses | RFC 8489 |

pub mod derp;
pub mod disco;
pub mod lock;
pub mod noise;
pub mod stun;
pub mod tailcfg;

pub use ts_keys as keys;

/// The capability version that our nodes advertise: what they implement, not what is newest.
///
/// Headscale 0.29 refuses nodes below 113; tailcfg.go says what each version adds.
pub const CAPABILITY_VERSION: u32 = 113;
