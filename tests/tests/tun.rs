//! The TUN device in real namespaces: what the kernel then says of it, and what passes through.

#![allow(
    clippy::unwrap_used,
    reason = "a test reports by panicking, and not only in its own body"
)]

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use tailnode_tests::{Namespace, eventually};
use tailnode_tun::{Error, Exit, Interface, Netns};

/// A virtio_net_hdr that says nothing.
const NO_OFFLOAD: [u8; 10] = [0; 10];

/// A host and, on it, a container with a device.
struct Scene {
    host: Namespace,
    container: Namespace,
    tun: OwnedFd,
    name: String,
}

impl Scene {
    fn new() -> Scene {
        let host = Namespace::new();
        let container = Namespace::new();
        let (tun, name) = attach(&host, &container, "tn1");
        Scene {
            host,
            container,
            tun,
            name,
        }
    }

    fn configure(&self, interface: &Interface) {
        tailnode_tun::configure(self.container.netns(), &self.name, interface).unwrap();
    }

    /// Everything that `configure` may touch.
    fn state(&self) -> [Value; 5] {
        // A link-local address is the kernel's, which takes its time with it and with its routes.
        let mut routes = self.container.ip_json("-6 route show table all");
        if let Some(routes) = routes.as_array_mut() {
            routes.retain(|route| !route["dst"].as_str().unwrap_or("").starts_with("fe80:"));
        }
        [
            self.container.ip_json("address show scope global"),
            self.container.ip_json("-4 route show table all"),
            routes,
            self.container.ip_json("-4 rule show"),
            self.container.ip_json("-6 rule show"),
        ]
    }

    /// The addresses of global scope on the device, with their prefix lengths.
    fn addresses(&self) -> Vec<String> {
        let links = self
            .container
            .ip_json(&format!("address show dev {} scope global", self.name));
        let addresses = links[0]["addr_info"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        // What the scope leaves out comes as an empty object.
        let mut addresses: Vec<_> = addresses
            .iter()
            .filter_map(|address| {
                Some(format!(
                    "{}/{}",
                    address["local"].as_str()?,
                    address["prefixlen"]
                ))
            })
            .collect();
        addresses.sort();
        addresses
    }

    /// Waits for an IP packet that `wanted` takes, passing over what the kernel says unasked, such
    /// as router solicitations.
    fn receive(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut device = File::from(self.tun.try_clone().unwrap());
        let mut buffer = [0; 2048];
        for _ in 0..100 {
            let mut ready = [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN)];
            assert_eq!(
                poll(&mut ready, 5000_u16).unwrap(),
                1,
                "nothing came to the device"
            );
            let length = device.read(&mut buffer).unwrap();
            let packet = &buffer[NO_OFFLOAD.len()..length];
            if wanted(packet) {
                return packet.to_vec();
            }
        }
        panic!("100 packets came to the device and none was the expected one");
    }
}

fn attach(host: &Namespace, container: &Namespace, name: &str) -> (OwnedFd, String) {
    host.run(|| {
        let tun = tailnode_tun::create(name).map_err(io::Error::other)?;
        let moved = tailnode_tun::move_into(name, container.netns(), "tailscale");
        Ok((tun, moved.map_err(io::Error::other)?))
    })
    .unwrap()
}

fn interface() -> Interface {
    Interface {
        addresses: vec![
            "100.64.0.7/32".parse().unwrap(),
            "fd7a:115c:a1e0::7/128".parse().unwrap(),
        ],
        routes: vec![
            "100.64.0.0/10".parse().unwrap(),
            "100.100.100.100/32".parse().unwrap(),
            "fd7a:115c:a1e0::/48".parse().unwrap(),
        ],
        mtu: 1280,
        index: 0,
        trap_dns: false,
        exit: Exit::No,
        forwards: false,
    }
}

/// Waits until a device whose descriptor was closed has gone: the children that other tests start
/// meanwhile have a copy of the descriptor until they run their program.
fn gone(container: &Namespace, device: &str) {
    eventually("the device is gone", Duration::from_secs(5), || {
        !container.links().iter().any(|link| link == device)
    });
}

/// Whether this is an IPv4 packet of UDP or TCP to port 53 of 8.8.8.8.
fn is_query(packet: &[u8]) -> bool {
    packet[0] == 0x45 && packet[16..20] == [8, 8, 8, 8] && packet[22..24] == [0, 53]
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_device_is_made_outside_and_set_up_inside() {
    let scene = Scene::new();
    assert_eq!(scene.name, "tailscale0");
    assert!(scene.host.links().is_empty());
    assert_eq!(
        tailnode_tun::device_name(scene.tun.as_fd()).unwrap(),
        "tailscale0"
    );
    let where_it_is = Netns::of_device(scene.tun.as_fd()).unwrap();
    assert_eq!(where_it_is.id(), scene.container.netns().id());
    assert_ne!(where_it_is.id(), scene.host.netns().id());

    scene.configure(&interface());
    let link = &scene.container.ip_json("link show tailscale0")[0];
    assert_eq!(link["mtu"], 1280);
    assert!(link["flags"].as_array().unwrap().contains(&"UP".into()));
    assert_eq!(
        scene.addresses(),
        ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"]
    );
    let way = &scene.container.ip_json("route get 100.64.0.9")[0];
    assert_eq!(
        (&way["dev"], &way["prefsrc"]),
        (&"tailscale0".into(), &"100.64.0.7".into())
    );
    let way = &scene.container.ip_json("-6 route get fd7a:115c:a1e0::9")[0];
    assert_eq!(way["dev"], "tailscale0");
    assert_eq!(way["prefsrc"], "fd7a:115c:a1e0::7");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn closing_the_descriptor_removes_the_device() {
    let scene = Scene::new();
    scene.configure(&interface());
    drop(scene.tun);
    gone(&scene.container, "tailscale0");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_device_is_removed_whoever_holds_it() {
    let scene = Scene::new();
    tailnode_tun::remove(scene.container.netns(), &scene.name).unwrap();
    assert!(scene.container.links().is_empty());
    assert!(matches!(
        tailnode_tun::device_name(scene.tun.as_fd()),
        Err(Error::Gone { .. })
    ));
    assert!(tailnode_tun::remove(scene.container.netns(), &scene.name).is_err());
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn the_descriptor_fails_when_the_container_is_gone() {
    let scene = Scene::new();
    scene.configure(&interface());
    drop(scene.container);
    let mut device = File::from(scene.tun.try_clone().unwrap());
    loop {
        // The kernel wakes who waits for packets, and not who waits for errors alone.
        let mut ready = [PollFd::new(scene.tun.as_fd(), PollFlags::POLLIN)];
        // It takes namespaces down in its own time; the bound is for a kernel that never does.
        assert_eq!(poll(&mut ready, PollTimeout::from(10_000_u16)).unwrap(), 1);
        if ready[0].revents().unwrap().contains(PollFlags::POLLERR) {
            break;
        }
        let _packet_of_no_interest = device.read(&mut [0; 2048]).unwrap();
    }
    assert_eq!(
        device.read(&mut [0; 2048]).unwrap_err().raw_os_error(),
        Some(nix::libc::EBADFD)
    );
    assert!(matches!(
        tailnode_tun::device_name(scene.tun.as_fd()),
        Err(Error::Gone { .. })
    ));
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_name_in_use_is_refused() {
    let host = Namespace::new();
    host.run(|| {
        let _tun = tailnode_tun::create("tn1").unwrap();
        assert!(matches!(
            tailnode_tun::create("tn1"),
            Err(Error::Create { .. })
        ));
        Ok(())
    })
    .unwrap();
    host.ip("tuntap add dev kept mode tun");
    host.run(|| {
        assert!(matches!(
            tailnode_tun::create("kept"),
            Err(Error::Create { .. })
        ));
        Ok(())
    })
    .unwrap();
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn devices_that_arrive_at_once_get_names_of_their_own() {
    let host = Namespace::new();
    let container = Namespace::new();
    let mut devices: Vec<_> = thread::scope(|scope| {
        let arrivals: Vec<_> = (0..8)
            .map(|number| {
                let (host, container) = (&host, &container);
                scope.spawn(move || attach(host, container, &format!("tn{number}")))
            })
            .collect();
        arrivals
            .into_iter()
            .map(|arrival| arrival.join().unwrap())
            .collect()
    });
    devices.sort_by(|(_, one), (_, other)| one.cmp(other));
    let names: Vec<_> = devices.iter().map(|(_, name)| name.clone()).collect();
    let expected: Vec<_> = (0..8).map(|number| format!("tailscale{number}")).collect();
    assert_eq!(names, expected);

    // A number that became free is given again.
    drop(devices.remove(3));
    gone(&container, "tailscale3");
    assert_eq!(attach(&host, &container, "tn9").1, "tailscale3");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn configuring_again_changes_nothing() {
    for (trap_dns, exit) in [(false, Exit::No), (true, Exit::Everything)] {
        let scene = Scene::new();
        let interface = Interface {
            trap_dns,
            exit,
            forwards: trap_dns,
            ..interface()
        };
        scene.configure(&interface);
        let before = scene.state();
        scene.configure(&interface);
        assert_eq!(scene.state(), before);
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn routes_follow_the_addresses() {
    for trap_dns in [false, true] {
        let (scene, fresh) = (Scene::new(), Scene::new());
        let before = Interface {
            trap_dns,
            ..interface()
        };
        let after = Interface {
            addresses: vec![
                "100.64.0.8/32".parse().unwrap(),
                "fd7a:115c:a1e0::8/128".parse().unwrap(),
            ],
            ..before.clone()
        };
        scene.configure(&before);
        scene.configure(&after);
        fresh.configure(&after);
        // The kernel numbers devices and times addresses by itself.
        let sources = |scene: &Scene| {
            let main = scene.container.ip("-4 route show table main");
            main + &scene.container.ip("-6 route show table main proto 84")
        };
        assert_eq!(sources(&scene), sources(&fresh));
        assert!(sources(&scene).contains("src fd7a:115c:a1e0::8"));
        assert_eq!(scene.addresses(), fresh.addresses());
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn what_is_no_longer_wanted_goes_and_what_is_not_ours_stays() {
    let scene = Scene::new();
    let bare = Scene::new();
    scene
        .container
        .ip("address add 172.19.0.2/16 dev tailscale0");
    scene.configure(&Interface {
        trap_dns: true,
        ..interface()
    });
    assert_eq!(
        scene.addresses(),
        ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"]
    );
    scene.container.ip("route add 192.0.2.0/24 dev tailscale0");

    let other = Interface {
        addresses: vec!["100.64.0.8/32".parse().unwrap()],
        routes: vec!["198.51.100.0/24".parse().unwrap()],
        ..interface()
    };
    scene.configure(&other);
    bare.configure(&other);
    bare.container.ip("route add 192.0.2.0/24 dev tailscale0");
    assert_eq!(scene.addresses(), ["100.64.0.8/32"]);
    let [_, routes, _, rules, rules6] = scene.state();
    let [_, bare_routes, _, bare_rules, bare_rules6] = bare.state();
    assert_eq!(
        (routes, rules, rules6),
        (bare_routes, bare_rules, bare_rules6)
    );
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn ipv6_works_where_docker_turned_it_off() {
    let scene = Scene::new();
    scene
        .container
        .sh("sysctl -qw net.ipv6.conf.tailscale0.disable_ipv6=1");
    scene.configure(&interface());
    assert_eq!(
        scene.addresses(),
        ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"]
    );
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn the_first_of_two_tailnets_wins_and_the_container_s_own_network_wins_over_both() {
    let scene = Scene::new();
    let (_second, second_name) = attach(&scene.host, &scene.container, "tn2");
    let lan = Namespace::new();
    scene
        .container
        .link("eth0", "10.1.0.2/16", &lan, "lan", "10.1.0.1/16");
    let mut first = interface();
    first.routes.push("10.1.0.0/16".parse().unwrap());
    let second = Interface {
        addresses: vec![
            "100.64.0.8/32".parse().unwrap(),
            "fd7a:115c:a1e0::8/128".parse().unwrap(),
        ],
        index: 1,
        ..first.clone()
    };
    // The order in which they come does not matter.
    tailnode_tun::configure(scene.container.netns(), &second_name, &second).unwrap();
    scene.configure(&first);
    let device = |words: &str| scene.container.ip_json(words)[0]["dev"].clone();
    assert_eq!(device("route get 100.64.0.9"), "tailscale0");
    assert_eq!(device("-6 route get fd7a:115c:a1e0::9"), "tailscale0");
    assert_eq!(device("route get 10.1.0.9"), "eth0");

    drop(scene.tun);
    gone(&scene.container, "tailscale0");
    assert_eq!(device("route get 100.64.0.9"), "tailscale1");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn an_exit_takes_everything_and_after_it_nothing_leaves_until_the_device_is_released() {
    for (exit, lan_stays) in [(Exit::Everything, false), (Exit::BesideLan, true)] {
        let scene = Scene::new();
        let lan = Namespace::new();
        let container = &scene.container;
        let before = scene.state();
        container.link("eth0", "10.1.0.2/16", &lan, "lan", "10.1.0.1/16");
        container.ip("address add 2001:db8::2/64 dev eth0 nodad");
        container.ip("route add default via 10.1.0.1");
        container.ip("route add default via 2001:db8::1");
        // The other way in may be replaced by the one that is asked for.
        for exit in [Exit::Everything, Exit::BesideLan, exit] {
            scene.configure(&Interface {
                exit,
                ..interface()
            });
        }
        let (_second, second) = attach(&scene.host, container, "tn2");
        let other = Interface {
            addresses: vec!["100.64.0.8/32".parse().unwrap()],
            routes: vec!["100.64.0.77/32".parse().unwrap()],
            index: 1,
            ..interface()
        };
        tailnode_tun::configure(container.netns(), &second, &other).unwrap();
        let way = |to: &str| {
            let asked = container
                .command("ip")
                .args(["-json", "route", "get", to])
                .output();
            let text = String::from_utf8(asked.unwrap().stdout).unwrap();
            let route: Value = serde_json::from_str(&text).unwrap_or_default();
            route[0]["dev"].as_str().unwrap_or_default().to_owned()
        };
        let of_lan = if lan_stays { "eth0" } else { "tailscale0" };
        assert_eq!([way("192.0.2.1"), way("2001:db8:1::1")], ["tailscale0"; 2]);
        assert_eq!([way("10.1.0.9"), way("2001:db8::9")], [of_lan; 2]);
        assert_eq!(way("100.64.0.9"), "tailscale0");
        assert_eq!(way("100.64.0.77"), "tailscale1");

        tailnode_tun::remove(container.netns(), "tailscale0").unwrap();
        assert_eq!([way("192.0.2.1"), way("2001:db8:1::1")], [""; 2]);
        for _ in 0..2 {
            tailnode_tun::release(container.netns(), "tailscale0", 0).unwrap();
        }
        assert_eq!([way("192.0.2.1"), way("2001:db8:1::1")], ["eth0"; 2]);
        container.ip("link delete eth0");
        tailnode_tun::release(container.netns(), "tailscale1", 1).unwrap();
        assert_eq!(scene.state()[3..], before[3..], "no rule is left");
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn forwarding_ends_with_the_last_device_that_wanted_it() {
    let scene = Scene::new();
    let (_second, second_name) = attach(&scene.host, &scene.container, "tn2");
    let netns = scene.container.netns();
    let switches = || {
        let words = "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding";
        scene.container.sh(words)
    };
    assert_eq!(switches(), "0\n0\n");
    let forwarding = Interface {
        forwards: true,
        ..interface()
    };
    scene.configure(&forwarding);
    let second = Interface {
        index: 1,
        ..forwarding.clone()
    };
    tailnode_tun::configure(netns, &second_name, &second).unwrap();
    scene.configure(&forwarding);
    assert_eq!(switches(), "1\n1\n");
    tailnode_tun::release(netns, &scene.name, 0).unwrap();
    assert_eq!(switches(), "1\n1\n");
    for _ in 0..2 {
        tailnode_tun::release(netns, &second_name, 1).unwrap();
    }
    assert_eq!(switches(), "0\n0\n");
}

/// A container as Docker makes it: a default route by eth0, strict about the way back.
fn docker_like() -> (Scene, Namespace) {
    let scene = Scene::new();
    let bridge = Namespace::new();
    scene
        .container
        .sh("sysctl -qw net.ipv4.conf.all.rp_filter=1");
    scene
        .container
        .link("eth0", "172.17.0.2/16", &bridge, "docker0", "172.17.0.1/16");
    scene.container.ip("route add default via 172.17.0.1");
    scene.configure(&Interface {
        trap_dns: true,
        ..interface()
    });
    (scene, bridge)
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_query_on_its_way_out_is_caught_and_its_answer_gets_in() {
    let (with_default, _bridge) = docker_like();
    let without_default = Scene::new();
    without_default.configure(&Interface {
        trap_dns: true,
        ..interface()
    });
    for scene in [with_default, without_default] {
        let socket = scene
            .container
            .run(|| UdpSocket::bind("0.0.0.0:0"))
            .unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        socket.send_to(b"question", "8.8.8.8:53").unwrap();
        let mut packet = scene.receive(is_query);
        assert_eq!(&packet[28..], b"question");
        assert_eq!(packet[12..16], Ipv4Addr::new(100, 64, 0, 7).octets());

        // The same packet with its ends exchanged is the answer: no sum in it changes by that.
        let (source, destination) = packet[12..20].split_at_mut(4);
        source.swap_with_slice(destination);
        let (source, destination) = packet[20..24].split_at_mut(2);
        source.swap_with_slice(destination);
        // UDP's sum may be left out, and the kernel left ours to a network card.
        packet[26..28].fill(0);
        let mut device = File::from(scene.tun.try_clone().unwrap());
        device
            .write_all(&[&NO_OFFLOAD[..], &packet].concat())
            .unwrap();
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"question");
        assert_eq!(from, SocketAddr::from(([8, 8, 8, 8], 53)));
    }
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn a_query_by_tcp_is_caught() {
    let (scene, _bridge) = docker_like();
    thread::scope(|scope| {
        scope.spawn(|| {
            let server = SocketAddr::from(([8, 8, 8, 8], 53));
            scene
                .container
                .run(|| {
                    Ok(TcpStream::connect_timeout(&server, Duration::from_millis(500)).is_err())
                })
                .unwrap()
        });
        scene.receive(|packet| is_query(packet) && packet[9] == 6);
    });
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn everything_else_keeps_its_way() {
    let (scene, _bridge) = docker_like();
    let way = |words: &str| scene.container.ip_json(words)[0]["dev"].clone();
    assert_eq!(way("route get 8.8.8.8 ipproto udp dport 53"), "tailscale0");
    assert_eq!(way("route get 8.8.8.8 ipproto udp dport 443"), "eth0");
    assert_eq!(way("route get 8.8.8.8"), "eth0");
    // A server that the container reaches by a route of its own is nobody else's business.
    assert_eq!(way("route get 172.17.0.1 ipproto udp dport 53"), "eth0");
    assert_eq!(way("route get 127.0.0.11 ipproto udp dport 53"), "lo");
    assert_eq!(
        way("-6 route get 2001:4860:4860::8888 ipproto udp dport 53"),
        "tailscale0"
    );

    // Without the device the rules are there and change nothing.
    drop(scene.tun);
    gone(&scene.container, "tailscale0");
    assert_eq!(way("route get 8.8.8.8 ipproto udp dport 53"), "eth0");
}

#[test]
#[ignore = "needs root and network namespaces; run by `sudo make test`"]
fn errors_say_what_and_where() {
    let scene = Scene::new();
    let error = tailnode_tun::configure(scene.container.netns(), "tailscale7", &interface());
    let message = error.unwrap_err().to_string();
    assert!(message.contains("tailscale7"), "{message}");
    let message = Netns::open("/run/netns/none").unwrap_err().to_string();
    assert!(message.contains("/run/netns/none"), "{message}");
    let message = Netns::open("/dev/null").unwrap_err().to_string();
    assert!(message.contains("/dev/null"), "{message}");
}
