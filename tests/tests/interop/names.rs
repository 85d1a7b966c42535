use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::{
    op::ResponseCode,
    rr::{
        RData,
        rdata::{A, TXT},
    },
};

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("names.magicdns", ALL, magicdns),
    ("names.unknown", ALL, unknown),
    ("names.extra-records", ALL, extra_records),
    ("names.public", ALL, public),
    ("names.split", ALL, split),
    ("names.long", ALL, long),
    ("names.renamed", ALL, renamed),
];

fn magicdns(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let resolver = MAGIC_DNS.parse().unwrap();
    within(PATIENCE, "the short name is resolved", || {
        web.resolve(resolver, "gopher").as_ref() == Ok(&gopher.addresses)
    });
    // Go's client tells no IPv6 address of who has an IPv4 one.
    let sides: [(&Namespace, &str, &[IpAddr], &[IpAddr]); 2] = [
        (&web, "gopher", &gopher.addresses, &gopher.addresses),
        (&gopher, "web", &web.addresses, &web.addresses[..1]),
    ];
    for (asker, name, addresses, told) in sides {
        let name = format!("{name}.{DOMAIN}.");
        is_at(asker, &name, told);
        for &address in addresses {
            let names = asker.names_of(resolver, address);
            assert_eq!(names.unwrap_or_default(), [&*name], "of {address}");
        }
    }
}

/// Nobody has the name, and nobody else is asked for it.
fn unknown(server: Server) {
    let scene = Scene::new(server);
    let name = format!("nobody.{DOMAIN}.");
    let elsewhere = RData::A(A(SOMEWHERE));
    let _public = NameServer::start(&scene.underlay, NameServer::PUBLIC, &[(&name, elsewhere)]);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    for (asker, other) in [(&*web, &gopher.addresses), (&*gopher, &web.addresses)] {
        reach(asker, other);
        let answer = asker.resolve(MAGIC_DNS.parse().unwrap(), &name);
        assert_eq!(answer, Err(ResponseCode::NXDomain));
    }
}

fn extra_records(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    for asker in [&*web, &*gopher] {
        is_at(
            asker,
            &format!("wiki.{DOMAIN}."),
            &[NameServer::WIKI.into()],
        );
    }
}

fn public(server: Server) {
    let scene = Scene::new(server);
    let known = [("www.example.org.", RData::A(A(SOMEWHERE)))];
    let _public = NameServer::start(&scene.underlay, NameServer::PUBLIC, &known);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    for asker in [&*web, &*gopher] {
        is_at(asker, "www.example.org.", &[SOMEWHERE.into()]);
        let answer = asker.resolve(MAGIC_DNS.parse().unwrap(), "none.example.org.");
        assert_eq!(answer, Err(ResponseCode::NXDomain));
    }
}

/// The names of one zone are asked of the server that the tailnet names, all others are not.
fn split(server: Server) {
    let scene = Scene::new(server);
    let office = format!("intranet.{}.", NameServer::OFFICE_ZONE);
    let outside = Ipv4Addr::new(192, 0, 2, 9);
    let at = |ip| RData::A(A(ip));
    let known = [(&*office, at(outside)), ("www.example.org.", at(SOMEWHERE))];
    let _public = NameServer::start(&scene.underlay, NameServer::PUBLIC, &known);
    let known = [(&*office, at(SOMEWHERE)), ("www.example.org.", at(outside))];
    let _office = NameServer::start(&scene.underlay, NameServer::OFFICE, &known);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    for asker in [&*web, &*gopher] {
        is_at(asker, &office, &[SOMEWHERE.into()]);
        is_at(asker, "www.example.org.", &[SOMEWHERE.into()]);
    }
}

/// An answer of 4 KB is cut by UDP, and comes whole by TCP.
fn long(server: Server) {
    let scene = Scene::new(server);
    let strings: Vec<String> = (0..17).map(|n| format!("{n:02}").repeat(125)).collect();
    let text = strings.concat();
    let known = [("long.example.org.", RData::TXT(TXT::new(strings)))];
    let _public = NameServer::start(&scene.underlay, NameServer::PUBLIC, &known);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    for asker in [&*web, &*gopher] {
        within(PATIENCE, "the long text is told", || {
            let told = asker.text_of(MAGIC_DNS.parse().unwrap(), "long.example.org.");
            told == Ok((text.clone(), true))
        });
    }
}

fn renamed(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let resolver = MAGIC_DNS.parse().unwrap();
    let sides: [(&Namespace, &str, &str, &[IpAddr]); 2] = [
        (&web, "gopher", "marmot", &gopher.addresses),
        (&gopher, "web", "net", &web.addresses[..1]),
    ];
    for (asker, old, new, told) in sides {
        is_at(asker, &format!("{old}.{DOMAIN}."), told);
        scene.rename(old, new);
        is_at(asker, &format!("{new}.{DOMAIN}."), told);
        let old = asker.resolve(resolver, &format!("{old}.{DOMAIN}."));
        assert_eq!(old, Err(ResponseCode::NXDomain));
        let names = asker.names_of(resolver, told[0]);
        assert_eq!(names.unwrap_or_default(), [format!("{new}.{DOMAIN}.")]);
    }
}

const SOMEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The name is resolved to these addresses.
fn is_at(asker: &Namespace, name: &str, addresses: &[IpAddr]) {
    within(PATIENCE, &format!("{name} is resolved"), || {
        asker.resolve(MAGIC_DNS.parse().unwrap(), name).as_deref() == Ok(addresses)
    });
}
