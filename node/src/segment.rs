//! A network of this host alone that several nodes share beside the tailnet.
//!
//! Docker gives each container on a network an address of its own choosing and resolves names to
//! it. So that those names lead somewhere, a node takes that address too: packets between two
//! members pass from one container to the other as those of neighbours do, after the same policy
//! as if they had used their tailnet addresses.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use ipnet::IpNet;

use crate::{neighbours::Door, packet::Packet};

/// The members of one such network. Cheap to clone; all clones are the same network.
#[derive(Clone, Default)]
pub struct Segment(Arc<RwLock<HashMap<IpAddr, Member>>>);

#[derive(Clone)]
struct Member {
    /// Its address in the tailnet, of the same family.
    tailnet: IpAddr,
    door: Weak<Door>,
}

/// A node's place in a segment; leaving is dropping it.
pub(crate) struct Membership {
    segment: Segment,
    network: IpNet,
    own: IpAddr,
    tailnet: IpAddr,
    /// Tells the own entry from that of a successor.
    door: Weak<Door>,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").finish_non_exhaustive()
    }
}

impl Segment {
    /// Joins as `network`'s host part, standing for the tailnet address `tailnet`.
    pub(crate) fn join(&self, network: IpNet, tailnet: IpAddr, door: Weak<Door>) -> Membership {
        let own = network.addr();
        let member = Member {
            tailnet,
            door: door.clone(),
        };
        self.write(|members| members.insert(own, member));
        Membership {
            segment: self.clone(),
            network,
            own,
            tailnet,
            door,
        }
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
    /// Stands for another tailnet address from now on.
    pub fn follow(&mut self, tailnet: IpAddr) {
        self.tailnet = tailnet;
        let member = Member {
            tailnet,
            door: self.door.clone(),
        };
        self.segment
            .write(|members| members.insert(self.own, member));
    }

    /// Whether a packet with these addresses belongs to the segment and not to the tailnet.
    pub fn concerns(&self, src: IpAddr, dst: IpAddr) -> bool {
        src == self.own || self.network.contains(&dst)
    }

    /// The packet with the tailnet addresses that its own stand for, and where it goes; `None`: one
    /// of them is no member's.
    pub fn stand_in<'a>(&self, packet: Packet<'a>) -> Option<(Packet<'a>, Arc<Door>)> {
        let member = self.find(packet.src(), packet.dst())?;
        let packet = packet.standing_for(self.tailnet, member.tailnet);
        Some((packet, member.door.upgrade()?))
    }

    fn find(&self, src: IpAddr, dst: IpAddr) -> Option<Member> {
        if src != self.own && src != self.tailnet {
            return None;
        }
        self.segment.read(|members| {
            let of_tailnet = || members.values().find(|member| member.tailnet == dst);
            members.get(&dst).or_else(of_tailnet).cloned()
        })
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.segment.write(|members| {
            let ours = |member: &Member| member.door.ptr_eq(&self.door);
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

    fn join(segment: &Segment, network: &str, tailnet: &str) -> Membership {
        segment.join(network.parse().unwrap(), ip(tailnet), Weak::new())
    }

    #[test]
    fn members_stand_for_their_tailnet_addresses_until_they_leave() {
        let segment = Segment::default();
        let a = join(&segment, "172.19.0.2/16", "100.64.0.1");
        let mut b = join(&segment, "172.19.0.3/16", "100.64.0.2");
        assert!(a.concerns(ip("100.64.0.1"), ip("172.19.0.3")));
        assert!(
            !a.concerns(ip("100.64.0.1"), ip("100.64.0.2")),
            "that is the tailnet's"
        );
        let found = |src, dst| Some(a.find(ip(src), ip(dst))?.tailnet);
        assert_eq!(found("172.19.0.2", "172.19.0.3"), Some(ip("100.64.0.2")));
        assert_eq!(found("100.64.0.1", "172.19.0.3"), Some(ip("100.64.0.2")));
        let answer = found("172.19.0.2", "100.64.0.2");
        assert_eq!(answer, Some(ip("100.64.0.2")));
        assert_eq!(found("172.19.0.9", "172.19.0.3"), None, "not its address");
        assert_eq!(found("172.19.0.2", "172.19.0.9"), None, "nobody's");
        b.follow(ip("100.64.0.7"));
        assert_eq!(found("172.19.0.2", "172.19.0.3"), Some(ip("100.64.0.7")));
        assert_eq!(found("172.19.0.2", "100.64.0.2"), None, "it was b's");
        drop(b);
        assert_eq!(found("172.19.0.2", "172.19.0.3"), None);
    }
}
