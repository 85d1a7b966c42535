//! The path to one peer: which of its addresses works best, and when to ask again.
//!
//! Sans-IO: time, pongs and pings come in, [`Action`]s come out. Packets go by the relay until an
//! address has answered; they go by both while the answer is old, and straight while it is fresh.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use tailnode_wire::disco::TxId;

// The timers are those of wgengine/magicsock/magicsock.go, so that both ends agree.
/// After this long without data the path is no longer watched.
const SESSION_ACTIVE: Duration = Duration::from_secs(45);
/// How often the path in use is pinged.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// For how long a pong vouches for its path. magicsock trusts for 6.5 s; a heartbeat and a half is
/// enough, because a lost pong only sends a copy by the relay, and a lost path is left sooner.
const TRUST: Duration = Duration::from_millis(4500);
/// How long the address in use has to answer once the peer shows up at a new one.
const PROOF: Duration = Duration::from_secs(1);
/// How often a better path is looked for while one works.
const UPGRADE: Duration = Duration::from_secs(60);
/// A path this quick is not worth improving.
const GOOD_ENOUGH: Duration = Duration::from_millis(5);
/// How often all addresses are tried while none works.
const DISCOVERY: Duration = Duration::from_secs(5);
/// How often a peer's call is answered by trying all addresses; new ones are tried at once.
const CALLED: Duration = Duration::from_secs(1);
/// An unanswered ping is given up.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// An address learned from the peer's own messages is forgotten after this long without an answer.
const LEARNED_LIFETIME: Duration = Duration::from_secs(180);
/// How many addresses are kept for a peer, so that a hostile one cannot make us ping the world.
const MAX_CANDIDATES: usize = 64;

/// How to send data to the peer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// No address is known to work.
    Relay,
    /// This address answered a moment ago.
    Direct(SocketAddr),
    /// This address answered, but a while ago: send by both.
    Both(SocketAddr),
}

/// What the owner of the sockets should send for the path's sake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A disco ping.
    Ping {
        /// To this address.
        to: SocketAddr,
        /// With this transaction.
        tx_id: TxId,
    },
    /// A call-me-maybe with our own endpoints, by the relay.
    CallMeMaybe,
    /// Nothing: the address in use has just stopped answering, and our own may have changed.
    LookAround,
}

/// What is known of the ways to one peer.
#[derive(Debug, Default)]
pub struct Path {
    candidates: HashMap<SocketAddr, Candidate>,
    pings: HashMap<TxId, SentPing>,
    best: Option<Best>,
    last_data: Option<Instant>,
    last_discovery: Option<Instant>,
    last_called: Option<Instant>,
    last_heartbeat: Option<Instant>,
}

#[derive(Debug)]
struct Candidate {
    /// Listed by the control server; otherwise learned from the peer at this time.
    learned: Option<Instant>,
}

#[derive(Debug)]
struct SentPing {
    to: SocketAddr,
    at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Best {
    address: SocketAddr,
    latency: Duration,
    trusted_until: Instant,
}

impl Path {
    /// Takes the addresses that the control server lists.
    pub fn set_endpoints(&mut self, endpoints: &[SocketAddr]) {
        self.candidates
            .retain(|address, c| c.learned.is_some() || endpoints.contains(address));
        for address in endpoints.iter().take(MAX_CANDIDATES) {
            self.candidates
                .insert(*address, Candidate { learned: None });
        }
    }

    /// How to send a batch of data now; asks for discovery where that is due.
    pub fn route(&mut self, now: Instant, actions: &mut Vec<Action>) -> Route {
        self.last_data = Some(now);
        if self.discovery_due(now) {
            self.discover(now, true, actions);
        }
        match self.best {
            None => Route::Relay,
            Some(best) if now < best.trusted_until => Route::Direct(best.address),
            Some(best) => Route::Both(best.address),
        }
    }

    /// Whether the peer may be found at an address.
    pub fn knows(&self, address: SocketAddr) -> bool {
        self.candidates.contains_key(&address)
    }

    /// The address in use, if it was vouched for lately.
    pub fn direct(&self, now: Instant) -> Option<SocketAddr> {
        self.best
            .filter(|best| now < best.trusted_until)
            .map(|best| best.address)
    }

    /// Whether data went to the peer lately.
    pub fn active(&self, now: Instant) -> bool {
        self.last_data.is_some_and(|at| now < at + SESSION_ACTIVE)
    }

    /// A pong came. Returns whether it answers a ping of ours.
    pub fn pong(&mut self, tx_id: TxId, now: Instant) -> bool {
        let Some(ping) = self.pings.remove(&tx_id) else {
            return false;
        };
        let found = Best {
            address: ping.to,
            latency: now.saturating_duration_since(ping.at),
            trusted_until: now + TRUST,
        };
        if let Some(learned) = self
            .candidates
            .get_mut(&ping.to)
            .and_then(|c| c.learned.as_mut())
        {
            *learned = now;
        }
        self.best = match self.best {
            Some(best) if best.address == found.address => Some(found),
            Some(best) if now < best.trusted_until && !better(&found, &best) => Some(best),
            _ => Some(found),
        };
        true
    }

    /// The peer pinged us from `from`: it may be reachable there.
    pub fn pinged(&mut self, from: SocketAddr, now: Instant, actions: &mut Vec<Action>) {
        if !self.learn(from, now) || !self.active(now) {
            return;
        }
        // Its NAT is open towards us at this moment, and ours now towards it: try at once.
        self.ping(from, now, actions);
        // It may be there because it has left the place that we know.
        if let Some(best) = &mut self.best {
            best.trusted_until = best.trusted_until.min(now + PROOF);
            let address = best.address;
            self.last_discovery = None;
            self.ping(address, now, actions);
        }
    }

    /// The peer asks by the relay to be pinged at these addresses.
    pub fn called(&mut self, endpoints: &[SocketAddr], now: Instant, actions: &mut Vec<Action>) {
        let due = self.last_called.is_none_or(|at| now >= at + CALLED);
        for address in endpoints.iter().take(MAX_CANDIDATES) {
            if self.learn(*address, now) && !due {
                self.ping(*address, now, actions);
            }
        }
        if due {
            self.last_called = Some(now);
            self.discover(now, false, actions);
        }
    }

    /// An address refused our datagrams (no route, port unreachable): do not trust it further.
    pub fn failed(&mut self, address: SocketAddr) {
        if self.best.is_some_and(|best| best.address == address) {
            self.best = None;
        }
    }

    /// The peer began a session by other means than the path in use: it may have lost it.
    pub fn doubt(&mut self, now: Instant) {
        if let Some(best) = &mut self.best {
            best.trusted_until = best.trusted_until.min(now);
        }
    }

    /// Our own endpoints changed: a peer that cannot be reached may be reachable now.
    pub fn moved(&mut self) {
        self.last_discovery = None;
    }

    /// Forgets what was measured, because our own network changed.
    pub fn reset(&mut self) {
        self.best = None;
        self.pings.clear();
        self.last_discovery = None;
    }

    /// Does what is due. Call it a few times a second while the path is active.
    pub fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.forget(now);
        if !self.active(now) {
            return;
        }
        if let Some(best) = self.best
            && self.last_heartbeat.is_none_or(|at| now >= at + HEARTBEAT)
        {
            self.last_heartbeat = Some(now);
            self.ping(best.address, now, actions);
        }
        if self.discovery_due(now) {
            self.discover(now, true, actions);
        }
    }

    /// Drops what is too old.
    fn forget(&mut self, now: Instant) {
        self.pings.retain(|_, ping| now < ping.at + PING_TIMEOUT);
        self.candidates
            .retain(|_, c| c.learned.is_none_or(|at| now < at + LEARNED_LIFETIME));
    }

    fn discovery_due(&self, now: Instant) -> bool {
        let since = |age| self.last_discovery.is_none_or(|at| now >= at + age);
        match self.best {
            Some(best) if now < best.trusted_until => best.latency > GOOD_ENOUGH && since(UPGRADE),
            _ => since(DISCOVERY),
        }
    }

    fn discover(&mut self, now: Instant, call: bool, actions: &mut Vec<Action>) {
        // Calls come to idle paths, too, which nobody ticks.
        self.forget(now);
        if call {
            self.last_discovery = Some(now);
            if self.best.is_some_and(|best| {
                best.trusted_until <= now && now < best.trusted_until + DISCOVERY
            }) {
                actions.push(Action::LookAround);
            }
            actions.push(Action::CallMeMaybe);
        }
        let addresses: Vec<_> = self.candidates.keys().copied().collect();
        for address in addresses {
            self.ping(address, now, actions);
        }
    }

    fn ping(&mut self, to: SocketAddr, now: Instant, actions: &mut Vec<Action>) {
        let tx_id = rand::random();
        self.pings.insert(tx_id, SentPing { to, at: now });
        actions.push(Action::Ping { to, tx_id });
    }

    /// Adds an address that the peer itself showed; returns whether it is new.
    fn learn(&mut self, address: SocketAddr, now: Instant) -> bool {
        if let Some(candidate) = self.candidates.get_mut(&address) {
            if let Some(learned) = &mut candidate.learned {
                *learned = now;
            }
            return false;
        }
        let room = self.candidates.len() < MAX_CANDIDATES;
        if room {
            self.candidates
                .insert(address, Candidate { learned: Some(now) });
        }
        room
    }
}

/// Whether to leave `now` for `new`: it must be clearly quicker, or as quick and of a nearer kind,
/// so that two equal paths do not alternate.
fn better(new: &Best, now: &Best) -> bool {
    let rank = |best: &Best| match best.address.ip() {
        ip if ip.is_loopback() => 0,
        IpAddr::V4(v4) if v4.is_private() || v4.is_link_local() => 1,
        IpAddr::V6(v6) if v6.is_unique_local() => 1,
        IpAddr::V6(_) => 2,
        IpAddr::V4(_) => 3,
    };
    let (new_us, now_us) = (new.latency.as_micros(), now.latency.as_micros());
    // A fifth and half a millisecond: below that two measurements of one path differ too.
    let margin = now_us / 5 + 500;
    new_us + margin < now_us || (rank(new) < rank(now) && new_us < now_us + margin)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "192.0.2.1:41641";
    const B: &str = "10.0.0.2:41641";

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    fn pings(actions: &[Action]) -> Vec<(SocketAddr, TxId)> {
        actions
            .iter()
            .filter_map(|action| match action {
                Action::Ping { to, tx_id } => Some((*to, *tx_id)),
                Action::CallMeMaybe | Action::LookAround => None,
            })
            .collect()
    }

    /// A path with A listed, and the pings of its first discovery.
    fn begun(now: Instant) -> (Path, Vec<(SocketAddr, TxId)>) {
        let mut path = Path::default();
        path.set_endpoints(&[at(A)]);
        let mut actions = Vec::new();
        assert_eq!(path.route(now, &mut actions), Route::Relay);
        assert!(actions.contains(&Action::CallMeMaybe));
        let pings = pings(&actions);
        (path, pings)
    }

    #[test]
    fn data_goes_by_relay_then_direct_then_both() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        assert_eq!(sent.iter().map(|p| p.0).collect::<Vec<_>>(), [at(A)]);
        let t1 = t0 + Duration::from_millis(2);
        assert!(path.pong(sent[0].1, t1));
        let mut actions = Vec::new();
        assert_eq!(path.route(t1, &mut actions), Route::Direct(at(A)));
        assert!(actions.is_empty(), "a quick path is not improved");
        assert_eq!(path.route(t1 + TRUST, &mut actions), Route::Both(at(A)));
        assert_eq!(path.route(t1 + DISCOVERY, &mut actions), Route::Both(at(A)));
        assert!(
            actions.contains(&Action::CallMeMaybe),
            "and discovery begins again"
        );
    }

    #[test]
    fn heartbeats_keep_the_path_trusted_while_data_flows_and_stop_after() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        path.pong(sent[0].1, t0);
        let mut now = t0;
        while now < t0 + SESSION_ACTIVE - HEARTBEAT {
            now += HEARTBEAT;
            let mut actions = Vec::new();
            path.tick(now, &mut actions);
            for (_, tx_id) in pings(&actions) {
                assert!(path.pong(tx_id, now));
            }
            assert_eq!(path.direct(now), Some(at(A)));
        }
        let mut actions = Vec::new();
        path.tick(t0 + SESSION_ACTIVE, &mut actions);
        assert!(actions.is_empty());
    }

    #[test]
    fn a_peer_that_moves_is_followed_unless_it_answers_where_it_was() {
        for stays in [false, true] {
            let t0 = Instant::now();
            let (mut path, sent) = begun(t0);
            path.pong(sent[0].1, t0);
            let other = at("192.0.2.2:41641");
            let mut now = t0;
            for wait in [Duration::ZERO, PROOF] {
                now += wait;
                let mut actions = Vec::new();
                path.pinged(other, now, &mut actions);
                path.tick(now, &mut actions);
                for (to, tx_id) in pings(&actions) {
                    if stays || to == other {
                        path.pong(tx_id, now);
                    }
                }
            }
            let found = if stays { at(A) } else { other };
            let route = path.route(now, &mut Vec::new());
            assert_eq!(route, Route::Direct(found), "{stays}");
        }
    }

    #[test]
    fn a_lost_address_makes_us_look_around_once() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        path.pong(sent[0].1, t0);
        let mut looks = Vec::new();
        for seconds in 0..40 {
            let mut actions = Vec::new();
            let now = t0 + TRUST + Duration::from_secs(seconds);
            path.route(now, &mut actions);
            looks.extend(actions.contains(&Action::LookAround).then_some(seconds));
        }
        assert_eq!(looks.len(), 1);
        assert!(looks[0] <= DISCOVERY.as_secs());
        // Told of what was found, the peer is called at once.
        let (now, mut actions) = (t0 + TRUST + Duration::from_secs(40), Vec::new());
        path.route(now, &mut actions);
        path.moved();
        actions.clear();
        path.route(now, &mut actions);
        assert!(actions.contains(&Action::CallMeMaybe));
    }

    #[test]
    fn a_pong_counts_once_and_only_if_we_pinged() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        assert!(!path.pong([7; 12], t0));
        assert!(path.pong(sent[0].1, t0));
        assert!(!path.pong(sent[0].1, t0));
    }

    #[test]
    fn a_call_is_answered_with_pings_but_no_call() {
        let t0 = Instant::now();
        let (mut path, _) = begun(t0);
        let mut actions = Vec::new();
        path.called(&[at(B)], t0, &mut actions);
        assert!(
            !actions.contains(&Action::CallMeMaybe),
            "or two peers would call forever"
        );
        assert!(pings(&actions).iter().any(|(to, _)| *to == at(B)));
    }

    #[test]
    fn a_peer_that_calls_without_end_gets_few_pings() {
        let t0 = Instant::now();
        let (mut path, _) = begun(t0);
        for n in 0..1000 {
            let mut actions = Vec::new();
            let now = t0 + n * CALLED / 10;
            path.called(&[at(B)], now, &mut actions);
            assert_eq!(pings(&actions).is_empty(), n % 10 != 0, "{n}");
            assert!(path.pings.len() < 20, "and none is remembered for long");
        }
        let mut actions = Vec::new();
        let new = at("10.0.0.3:1");
        path.called(&[new], t0 + 999 * CALLED / 10, &mut actions);
        assert_eq!(pings(&actions)[0].0, new, "a new address is tried at once");
    }

    #[test]
    fn a_nearer_path_of_equal_speed_wins_and_stays() {
        let t0 = Instant::now();
        let far = Best {
            address: at(A),
            latency: Duration::from_millis(2),
            trusted_until: t0,
        };
        let near = Best {
            address: at(B),
            ..far
        };
        assert!(better(&near, &far));
        assert!(!better(&far, &near));
        let slow = Best {
            address: at(B),
            latency: Duration::from_millis(20),
            ..far
        };
        assert!(better(&far, &slow));
    }

    #[test]
    fn a_doubted_path_carries_a_copy_until_it_answers_again() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        path.pong(sent[0].1, t0);
        path.doubt(t0);
        let mut actions = Vec::new();
        let t1 = t0 + DISCOVERY;
        assert_eq!(path.route(t1, &mut actions), Route::Both(at(A)));
        let (_, tx_id) = pings(&actions)[0];
        path.pong(tx_id, t1);
        assert_eq!(path.route(t1, &mut actions), Route::Direct(at(A)));
    }

    #[test]
    fn a_failed_address_is_left_at_once() {
        let t0 = Instant::now();
        let (mut path, sent) = begun(t0);
        path.pong(sent[0].1, t0);
        path.failed(at(A));
        assert_eq!(path.route(t0, &mut Vec::new()), Route::Relay);
    }

    proptest! {
        /// Whatever happens: only addresses that answered carry data, memory stays bounded, and
        /// a path is not trusted beyond its time.
        #[test]
        fn invariants(steps in proptest::collection::vec((0u8..6, 1u16..200, 0u64..4000), 1..200)) {
            let mut now = Instant::now();
            let mut path = Path::default();
            let mut answered = Vec::new();
            let mut actions = Vec::new();
            for (kind, port, wait) in steps {
                now += Duration::from_millis(wait);
                let address = SocketAddr::from(([192, 0, 2, 9], port));
                match kind {
                    0 => path.set_endpoints(&[address]),
                    1 => path.pinged(address, now, &mut actions),
                    2 => path.called(&[address], now, &mut actions),
                    3 => path.tick(now, &mut actions),
                    4 => if let Some((to, tx_id)) = pings(&actions).pop()
                        && path.pong(tx_id, now)
                    {
                        answered.push((to, now));
                    },
                    _ => match path.route(now, &mut actions) {
                        Route::Relay => {}
                        Route::Direct(to) => prop_assert!(
                            answered.iter().any(|(a, t)| *a == to && now < *t + TRUST)),
                        Route::Both(to) => prop_assert!(answered.iter().any(|(a, _)| *a == to)),
                    },
                }
                prop_assert!(path.candidates.len() <= MAX_CANDIDATES + 1);
            }
        }
    }
}
