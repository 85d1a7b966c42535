//! A network of this host alone that several nodes share beside the tailnet.
//!
//! Docker gives each container on a network an address of its own choosing and resolves names to
//! it. So that those names lead somewhere, a node takes that address too: packets between two
//! members pass from one container to the other inside the daemon, after the same policy as if
//! they had used their tailnet addresses.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use ipnet::IpNet;
use tokio::sync::mpsc;

/// Packets that wait for a member; beyond that they are dropped, as a full queue does.
const QUEUE: usize = 256;

/// The members of one such network. Cheap to clone; all clones are the same network.
#[derive(Clone, Debug, Default)]
pub struct Segment(Arc<RwLock<HashMap<IpAddr, Member>>>);

#[derive(Clone, Debug)]
struct Member {
    /// Its address in the tailnet, of the same family.
    tailnet: IpAddr,
    packets: mpsc::Sender<Crossing>,
}

/// A packet on its way to another member.
#[derive(Debug)]
pub(crate) struct Crossing {
    /// As the container sent it.
    pub packet: Vec<u8>,
    /// The tailnet addresses that it stands for, for policy to judge.
    pub src: IpAddr,
    /// See `src`.
    pub dst: IpAddr,
}

/// A node's place in a segment; leaving is dropping it.
#[derive(Debug)]
pub(crate) struct Membership {
    segment: Segment,
    network: IpNet,
    own: IpAddr,
    tailnet: IpAddr,
    /// Tells the own entry from that of a successor.
    packets: mpsc::Sender<Crossing>,
}

impl Segment {
    /// Joins as `network`'s host part, standing for the tailnet address `tailnet`.
    pub(crate) fn join(
        &self,
        network: IpNet,
        tailnet: IpAddr,
    ) -> (Membership, mpsc::Receiver<Crossing>) {
        let (packets, received) = mpsc::channel(QUEUE);
        let own = network.addr();
        let member = Member {
            tailnet,
            packets: packets.clone(),
        };
        self.write(|members| members.insert(own, member));
        (
            Membership {
                segment: self.clone(),
                network,
                own,
                tailnet,
                packets,
            },
            received,
        )
    }

    fn write<T>(&self, change: impl FnOnce(&mut HashMap<IpAddr, Member>) -> T) -> T {
        // A panic elsewhere leaves the map whole: each change is one insertion or removal.
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn read<T>(&self, look: impl FnOnce(&HashMap<IpAddr, Member>) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Membership {
    /// Whether a packet with these addresses belongs to the segment and not to the tailnet.
    pub fn concerns(&self, src: IpAddr, dst: IpAddr) -> bool {
        src == self.own || self.network.contains(&dst)
    }

    /// The tailnet addresses that a packet's stand for; `None`: one of them is no member's.
    pub fn stands_for(&self, src: IpAddr, dst: IpAddr) -> Option<(IpAddr, IpAddr)> {
        if src != self.own && src != self.tailnet {
            return None;
        }
        self.segment.read(|members| {
            let dst = members.get(&dst).map(|member| member.tailnet).or_else(|| {
                members
                    .values()
                    .any(|member| member.tailnet == dst)
                    .then_some(dst)
            })?;
            Some((self.tailnet, dst))
        })
    }

    /// Hands a packet to the member with the tailnet address `crossing.dst`; drops it if the
    /// member is behind.
    pub fn send(&self, crossing: Crossing) {
        let member = self.segment.read(|members| {
            members
                .values()
                .find(|member| member.tailnet == crossing.dst)
                .cloned()
        });
        if let Some(member) = member {
            // Full or gone: either way the packet is lost, which its transport repairs.
            let _ = member.packets.try_send(crossing);
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.segment.write(|members| {
            let ours = |member: &Member| member.packets.same_channel(&self.packets);
            if members.get(&self.own).is_some_and(ours) {
                members.remove(&self.own);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn members_stand_for_their_tailnet_addresses_until_they_leave() {
        let segment = Segment::default();
        let (a, _) = segment.join("172.19.0.2/16".parse().unwrap(), ip("100.64.0.1"));
        let (b, mut received) = segment.join("172.19.0.3/16".parse().unwrap(), ip("100.64.0.2"));
        assert!(a.concerns(ip("100.64.0.1"), ip("172.19.0.3")));
        assert!(
            !a.concerns(ip("100.64.0.1"), ip("100.64.0.2")),
            "that is the tailnet's"
        );
        let stands = Some((ip("100.64.0.1"), ip("100.64.0.2")));
        assert_eq!(a.stands_for(ip("172.19.0.2"), ip("172.19.0.3")), stands);
        assert_eq!(a.stands_for(ip("100.64.0.1"), ip("172.19.0.3")), stands);
        assert_eq!(
            a.stands_for(ip("172.19.0.2"), ip("100.64.0.2")),
            stands,
            "an answer"
        );
        assert_eq!(
            a.stands_for(ip("172.19.0.9"), ip("172.19.0.3")),
            None,
            "not its address"
        );
        assert_eq!(
            a.stands_for(ip("172.19.0.2"), ip("172.19.0.9")),
            None,
            "nobody's"
        );
        a.send(Crossing {
            packet: vec![1],
            src: ip("100.64.0.1"),
            dst: ip("100.64.0.2"),
        });
        assert_eq!(received.try_recv().unwrap().packet, [1]);
        drop(b);
        assert_eq!(a.stands_for(ip("172.19.0.2"), ip("172.19.0.3")), None);
    }

    #[test]
    fn an_address_taken_over_stays_with_its_new_owner() {
        let segment = Segment::default();
        let join = |tailnet| {
            segment
                .join("172.19.0.2/16".parse().unwrap(), ip(tailnet))
                .0
        };
        let (old, again) = (join("100.64.0.1"), join("100.64.0.1"));
        let there = || segment.read(|members| members.contains_key(&ip("172.19.0.2")));
        drop(old);
        assert!(there());
        let _new = join("100.64.0.2");
        drop(again);
        assert!(there());
    }
}
