//! What the network around a node looks like: its public endpoints and the nearest relay.
//!
//! Sans-IO: rounds of STUN requests go out, answers come in, a [`Report`] results.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

use tailnode_wire::{
    stun::{self, TxId},
    tailcfg::RegionId,
};

/// Answers that take longer than this say nothing.
const ROUND: Duration = Duration::from_secs(3);
/// An answer counts until the server's next one, but at most this long: two of an idle node's
/// rounds and more, so that neither a round under way nor a lost datagram changes anything.
const LIFETIME: Duration = Duration::from_secs(300);
/// Another region must be quicker by this part of the present home's latency to become home.
const HOME_HYSTERESIS: f64 = 2.0 / 3.0;

/// A STUN server of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its region.
    pub region: RegionId,
    /// Its address.
    pub address: SocketAddr,
    /// Whether the region may become home.
    pub eligible: bool,
}

/// What is known so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Where peers should find us; 0: not known.
    pub home: RegionId,
    /// Whether STUN answers tell which region is to be home.
    pub by_stun: bool,
    /// Our endpoints as STUN servers saw them.
    pub public: BTreeSet<SocketAddr>,
    /// The quickest answer of each region.
    pub latency: BTreeMap<RegionId, Duration>,
    /// Whether servers saw different IPv4 ports: the NAT maps by destination.
    pub mapping_varies: Option<bool>,
}

/// Rounds of questions to the STUN servers.
#[derive(Debug, Default)]
pub struct Netcheck {
    targets: Vec<Target>,
    pending: HashMap<TxId, (Target, Instant)>,
    round: Option<Instant>,
    /// By server: how long it took, where it saw us, and when.
    seen: HashMap<SocketAddr, (Target, Duration, SocketAddr, Instant)>,
    home: RegionId,
    /// The region to take while no STUN server answers; 0: none known.
    fallback: RegionId,
    /// Regions whose relays cannot be reached, whatever their STUN servers answer.
    lost: BTreeSet<RegionId>,
}

impl Netcheck {
    /// Takes new servers; the next round asks them.
    pub fn set_targets(&mut self, targets: Vec<Target>) {
        self.seen.retain(|_, (target, ..)| targets.contains(target));
        if !targets.iter().any(|target| target.region == self.home) {
            self.home = 0;
        }
        self.targets = targets;
        self.round = None;
    }

    /// Takes the region that was found nearest by other means than STUN.
    pub fn set_fallback(&mut self, region: RegionId) {
        if self.home == self.fallback {
            self.home = 0;
        }
        self.fallback = region;
    }

    /// Takes the regions whose relays cannot be reached: another is home as long as there is one.
    /// Returns whether that is news.
    pub fn set_lost(&mut self, regions: BTreeSet<RegionId>) -> bool {
        let news = self.lost != regions;
        self.lost = regions;
        news
    }

    /// Our network changed: forget what was seen.
    pub fn reset(&mut self) {
        self.seen.clear();
        self.pending.clear();
        self.round = None;
    }

    /// Starts a round; returns the requests to send.
    pub fn start(&mut self, now: Instant) -> Vec<(SocketAddr, Vec<u8>)> {
        self.round = Some(now);
        self.pending.retain(|_, (_, at)| now < *at + ROUND);
        let mut requests = Vec::with_capacity(self.targets.len());
        for target in &self.targets {
            let tx_id: TxId = rand::random();
            self.pending.insert(tx_id, (*target, now));
            requests.push((target.address, stun::request(&tx_id)));
        }
        requests
    }

    /// A datagram that looks like STUN came; returns whether it taught us anything.
    pub fn answer(&mut self, datagram: &[u8], now: Instant) -> bool {
        let Ok((tx_id, seen_as)) = stun::parse_response(datagram) else {
            return false;
        };
        let Some((target, at)) = self.pending.remove(&tx_id) else {
            return false;
        };
        let took = now.saturating_duration_since(at);
        if took > ROUND {
            return false;
        }
        self.seen
            .insert(target.address, (target, took, seen_as, now));
        true
    }

    /// Whether a round is under way whose answers are worth waiting for.
    pub fn waiting(&self, now: Instant) -> bool {
        self.round.is_some_and(|at| now < at + ROUND)
            && self.pending.values().any(|(_, at)| Some(*at) == self.round)
    }

    /// What is known now; settles on a home.
    pub fn report(&mut self, now: Instant) -> Report {
        self.seen.retain(|_, (_, _, _, at)| now < *at + LIFETIME);
        let mut report = Report::default();
        let mut ports = BTreeSet::new();
        for (target, took, seen_as, _) in self.seen.values() {
            let latency = report.latency.entry(target.region).or_insert(*took);
            *latency = (*latency).min(*took);
            report.public.insert(*seen_as);
            if seen_as.ip().is_ipv4() {
                ports.insert((target.address, *seen_as));
            }
        }
        if ports.len() > 1 {
            let first = ports.first().map(|(_, seen)| *seen);
            report.mapping_varies = Some(ports.iter().any(|(_, seen)| Some(*seen) != first));
        }
        let eligible = |region: &RegionId| {
            let mut targets = self.targets.iter();
            !self.lost.contains(region)
                && targets.any(|target| target.region == *region && target.eligible)
        };
        let quickest = report
            .latency
            .iter()
            .filter(|(region, _)| eligible(region))
            .min_by_key(|(region, latency)| (**latency, **region))
            .map(|(region, latency)| (*region, *latency));
        if let Some((region, latency)) = quickest {
            let keep = report.latency.get(&self.home).is_some_and(|home| {
                eligible(&self.home) && latency.as_secs_f64() > home.as_secs_f64() * HOME_HYSTERESIS
            });
            if !keep {
                self.home = region;
            }
        } else if self.home == 0 || self.lost.contains(&self.home) {
            let mut regions = self.targets.iter().map(|target| target.region);
            let first = regions.find(&eligible);
            // Where there is but one, nothing need be measured.
            let only =
                first.filter(|first| regions.all(|other| other == *first || !eligible(&other)));
            let fallback =
                Some(self.fallback).filter(|region| *region != 0 && !self.lost.contains(region));
            self.home = only.or(fallback).unwrap_or(self.home);
        }
        report.home = self.home;
        report.by_stun = quickest.is_some();
        report
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(region: RegionId) -> Target {
        Target {
            region,
            address: SocketAddr::from(([192, 0, 2, region as u8], 3478)),
            eligible: true,
        }
    }

    fn answer(request: &[u8], seen_as: &str) -> Vec<u8> {
        let tx_id = stun::parse_request(request).unwrap();
        stun::response(&tx_id, seen_as.parse().unwrap())
    }

    /// One round in which region n answers after `latencies[n]` milliseconds.
    fn round(check: &mut Netcheck, start: Instant, latencies: &[(RegionId, u64)]) -> Report {
        let requests = check.start(start);
        let mut now = start;
        let mut order = latencies.to_vec();
        order.sort_by_key(|(_, ms)| *ms);
        for (region, ms) in order {
            now = start + Duration::from_millis(ms);
            let request = &requests
                .iter()
                .find(|(to, _)| *to == target(region).address)
                .unwrap()
                .1;
            assert!(check.answer(&answer(request, "198.51.100.7:4000"), now));
        }
        check.report(now)
    }

    #[test]
    fn the_nearest_region_becomes_home_and_stays_unless_clearly_beaten() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(1), target(2)]);
        let t0 = Instant::now();
        assert_eq!(round(&mut check, t0, &[(1, 30), (2, 40)]).home, 1);
        let t1 = t0 + Duration::from_secs(30);
        assert_eq!(round(&mut check, t1, &[(1, 30), (2, 25)]).home, 1);
        let t2 = t1 + Duration::from_secs(30);
        let report = round(&mut check, t2, &[(1, 30), (2, 10)]);
        assert_eq!(report.home, 2);
        assert_eq!(
            report.public,
            BTreeSet::from(["198.51.100.7:4000".parse().unwrap()])
        );
        assert_eq!(report.mapping_varies, Some(false));
    }

    #[test]
    fn without_udp_there_is_a_home_all_the_same() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(9), target(3)]);
        let now = Instant::now();
        check.start(now);
        assert!(check.waiting(now));
        assert!(!check.waiting(now + ROUND));
        assert_eq!(check.report(now + ROUND).home, 0);
        check.set_fallback(3);
        assert_eq!(check.report(now + ROUND).home, 3);
        // The map no longer has it.
        check.set_targets(vec![target(9)]);
        check.set_fallback(9);
        assert_eq!(check.report(now + ROUND).home, 9);
    }

    #[test]
    fn the_only_region_is_home_at_once() {
        let mut check = Netcheck::default();
        let avoided = Target {
            eligible: false,
            ..target(2)
        };
        check.set_targets(vec![avoided, target(1), target(1)]);
        let now = Instant::now();
        check.start(now);
        assert_eq!(check.report(now).home, 1);
        check.set_targets(vec![avoided]);
        assert_eq!(check.report(now).home, 0);
    }

    #[test]
    fn a_region_whose_relay_is_lost_is_home_only_where_there_is_no_other() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(1), target(2)]);
        let t0 = Instant::now();
        assert_eq!(round(&mut check, t0, &[(1, 10), (2, 90)]).home, 1);
        assert!(check.set_lost([1].into()));
        assert!(!check.set_lost([1].into()));
        let report = check.report(t0 + ROUND);
        assert_eq!((report.home, report.by_stun), (2, true));
        check.set_lost([1, 2].into());
        let report = check.report(t0 + ROUND);
        assert_eq!((report.home, report.by_stun), (2, false));
        check.set_lost(BTreeSet::new());
        assert_eq!(check.report(t0 + ROUND).home, 1);
    }

    #[test]
    fn where_stun_knows_no_other_region_the_nearest_replaces_a_lost_one() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(1), target(2), target(3)]);
        let t0 = Instant::now();
        assert_eq!(round(&mut check, t0, &[(1, 10)]).home, 1);
        check.set_lost([1].into());
        let report = check.report(t0 + ROUND);
        assert_eq!((report.home, report.by_stun), (1, false));
        check.set_fallback(2);
        assert_eq!(check.report(t0 + ROUND).home, 2);
        // A fallback that is lost as well is none.
        check.set_lost([1, 2, 3].into());
        assert_eq!(check.report(t0 + ROUND).home, 2);
        check.set_lost(BTreeSet::new());
        assert_eq!(check.report(t0 + ROUND).home, 1);
    }

    #[test]
    fn a_round_under_way_changes_nothing() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(1), target(2)]);
        let t0 = Instant::now();
        let before = round(&mut check, t0, &[(1, 30), (2, 40)]);
        let later = t0 + Duration::from_secs(120);
        let requests = check.start(later);
        assert_eq!(check.report(later), before);
        let first = answer(&requests[1].1, "198.51.100.7:4000");
        let now = later + Duration::from_millis(40);
        assert!(check.answer(&first, now));
        assert_eq!(check.report(now), before, "the home has not answered yet");
        assert!(check.report(t0 + 2 * LIFETIME).public.is_empty());
    }

    #[test]
    fn strangers_and_late_answers_teach_nothing() {
        let mut check = Netcheck::default();
        check.set_targets(vec![target(1)]);
        let now = Instant::now();
        let requests = check.start(now);
        let response = answer(&requests[0].1, "198.51.100.7:4000");
        assert!(!check.answer(
            &stun::response(&[9; 12], "198.51.100.7:1".parse().unwrap()),
            now
        ));
        assert!(!check.answer(&response, now + ROUND + Duration::from_millis(1)));
        assert!(!check.answer(&response, now), "an answer counts once");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let mut check = Netcheck::default();
            check.set_targets(vec![target(1)]);
            check.start(Instant::now());
            check.answer(&bytes, Instant::now());
        }
    }
}
