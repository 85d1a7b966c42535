use std::net::IpAddr;

use crate::scene::*;

pub const CASES: &[Case] = &[("names.magicdns", ALL, magicdns)];

fn magicdns(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let resolver = MAGIC_DNS.parse().unwrap();
    within(5, "the short name is resolved", || {
        web.resolve(resolver, "gopher").as_ref() == Ok(&gopher.addresses)
    });
    // Go's client tells no IPv6 address of who has an IPv4 one.
    let sides: [(&Namespace, &str, &[IpAddr], &[IpAddr]); 2] = [
        (&web, "gopher", &gopher.addresses, &gopher.addresses),
        (&gopher, "web", &web.addresses, &web.addresses[..1]),
    ];
    for (asker, name, addresses, told) in sides {
        let name = format!("{name}.{DOMAIN}.");
        within(5, &format!("{name} is resolved"), || {
            asker.resolve(resolver, &name).as_deref() == Ok(told)
        });
        for &address in addresses {
            let names = asker.names_of(resolver, address);
            assert_eq!(names.unwrap_or_default(), [&*name], "of {address}");
        }
    }
}
