"""English of grade-school word problems, as a word list: what the tiny model's tokenizer is trained on.

Common words, written down by hand; no text of a dataset is in here. Each list is roughly in order of frequency.
"""

from __future__ import annotations

FUNCTION_WORDS = """
the a of to and is in he she has for they it each on are how many much does if at so that her his more with than be
per was total all have will as from there which by this their had cost an or two one them then number left first after
out three also not times now would who up were did days day only half do day can into over four twice five its ten get
we i you when what before while every other because about both together another same some still already since until
between during most less fewer least many again away off down back around without within remaining additional
altogether average equal equally equals rest difference amount older younger taller longer shorter bigger smaller
larger greater old new long big small large extra full empty whole different last next second third fourth fifth six
seven eight nine eleven twelve thirteen fourteen fifteen sixteen eighteen twenty thirty forty fifty sixty seventy
eighty ninety hundred thousand million dozen pair double triple quarter percent fraction ratio multiple plus minus
later early late ago today yesterday tomorrow tonight daily weekly monthly yearly once thrice always never usually
originally initially finally currently instead however therefore thus means must needs could should might may being
been having done made gone here where why just very too even well good better best own per cents cent dollars dollar
let us my our your him me himself herself themselves itself whose whom those these any none no yes either neither
nothing something everyone everything anyone someone people person like such combined regular original single entire
final certain exactly though although unless according due using along across through under above below near far
inside outside behind beside against per among towards free ready able sure enough few several various red blue green
yellow white black brown purple orange pink gold silver dark light hot cold warm fresh dry wet heavy high low short
tall wide deep fast slow quick hard easy soft cheap expensive used broken clean dirty correct wrong true right happy
sad tired sick hungry special favorite local public private main major minor initial previous following current total
maximum minimum normal typical standard available possible left-over one-third two-thirds one-half one-fourth
three-fourths one-fifth two-fifths three-quarters
"""

NAMES = """
Monday Tuesday Wednesday Thursday Friday Saturday Sunday April Natalia John James Tom Mary Anna Emily Sarah Mark David
Peter Mike Jack Sam Lisa Jane Bob Alice Tim Joe Ben Amy Kim Jim Dan Max Carlos Maria Lucy Emma Julia Nina Grace Olivia
Betty Clara Ruth Leo Adam Henry Omar Robert Michael Jason Kevin Brian George Paul Steve Eric Ryan Josh Jenny Jessica
Rachel Laura Karen Susan Nancy Linda Sally Molly Kate Katie Kelly Megan Melissa Samantha Stephanie Mia Ella Lily Rose
Sophia Isabella Ava Chloe Zoe Claire Janet Janice Jill Judy Julie Joy Jordan Justin Jerry Jeremy Jeff Harry Gary Frank
Fred Greg Edward Doug Derek Dean Danny Daniel Chris Charles Charlie Carl Cindy Christina Brenda Brandon Brad Billy
Bill Becky Barbara Andy Andrew Angela Anne Ann Alex Alexander Allison Albert Alan Abby Aaron Arthur Austin Anthony
Antonio Bella Bobby Bruce Carla Carol Carmen Carol Cathy Cody Colin Dave Debbie Dennis Diana Donald Donna Dora Dylan
Elizabeth Ellen Eva Evan Felix Fiona Gina Gerald Hannah Harold Heather Helen Ian Ivan Jackson Jacob Jake Jasmine Jay
Jean Joan Jonathan Jose Joseph Juan Ken Kenny Kyle Larry Lauren Lee Leah Liam Louis Luke Luis Madison Marcus Margaret
Maggie Marie Martha Martin Marty Matt Matthew Meg Mikey Miguel Milly Mitchell Nathan Nick Nicole Noah Oliver Oscar Pam
Pat Patrick Patty Paula Pete Phil Philip Rob Ralph Ray Raymond Rebecca Richard Rick Ricky Roger Ron Ronald Rosa Roy
Russell Sandra Sandy Sara Scott Sean Seth Sharon Shawn Sheila Simon Sofia Stacy Stan Stella Steven Sue Susie Tara Ted
Teddy Terry Theo Theresa Thomas Tina Toby Todd Tommy Tony Tracy Travis Tyler Valerie Victor Victoria Vincent Walter
Wendy William Willie Wayne Natalie Natalia Marco Raul Pedro Diego Jamal Ahmed Ali Farmer Uncle Aunt Grandma Grandpa Mr
Mrs Ms Dr Miss Mom Dad New York Texas California America American Christmas Halloween Easter Thanksgiving January
February March April May June July August September October November December
"""

NOUNS = """
dollar hour minute day week month year time student apple book friend car school egg child house mile money cookie bag
box class girl boy cup pound piece game page pencil store ticket price toy ball flower tree room shirt dog cat bottle
pack gallon ounce inch foot meter kilometer centimeter liter kilogram gram yard acre ton second weekend night morning
afternoon evening breakfast lunch dinner meal snack food water milk juice soda coffee tea bread cake pie pizza slice
sandwich burger candy chocolate bar ice cream chip cheese butter sugar flour salt rice pasta meat chicken beef fish
turkey salad soup sauce fruit orange banana grape cherry peach pear lemon lime melon watermelon pineapple mango berry
strawberry blueberry raspberry coconut plum tomato potato carrot onion pepper cucumber corn bean pea pumpkin vegetable
lettuce mushroom nut peanut walnut almond cupcake muffin donut brownie pancake waffle cereal lollipop gum gumball
jellybean marshmallow popcorn jar can basket bucket tray plate bowl glass spoon fork knife dish pan oven kitchen table
chair desk bed couch sofa lamp light door window wall floor roof fence garden yard park farm field barn house
apartment building tower bridge road street city town village country state island beach lake river ocean sea mountain
hill forest zoo museum library theater movie show concert party birthday wedding gift present card balloon candle
decoration ribbon bow letter stamp envelope package mail newspaper magazine story novel chapter notebook paper sheet
pen marker crayon eraser ruler backpack uniform shoe sock pair pants jeans dress skirt jacket coat sweater hat cap
scarf glove tie belt watch ring necklace bracelet earring bead jewelry gem diamond coin quarter dime nickel penny bill
bank account budget allowance salary wage income rent tax tip discount sale coupon fee charge interest loan debt
profit loss revenue savings deposit bonus paycheck overtime job work task project chore homework test exam quiz
question answer problem point score grade lesson subject math science art history music band song piano guitar violin
drum instrument dance dancer singer teacher principal professor doctor nurse patient dentist hospital clinic pill
medicine lawyer police officer firefighter soldier worker employee manager boss company business office factory shop
market supermarket mall restaurant cafe bakery baker cook chef waiter waitress customer client guest visitor passenger
driver pilot captain team player coach league season tournament match race lap mile track goal basket soccer football
baseball basketball tennis hockey volleyball golf swim pool gym exercise push-up sit-up jump rope bike bicycle truck
van bus train plane boat ship taxi motorcycle wheel tire engine gas fuel tank gasoline trip vacation journey flight
hotel camp tent hike trail distance speed rate length width height weight area perimeter volume depth size shape
square rectangle triangle circle side angle degree temperature row column line group set pile stack bundle batch crate
carton case container shelf rack drawer cabinet closet section part portion share half third mother father parent
brother sister sibling twin son daughter baby kid adult man woman family uncle aunt cousin nephew niece grandmother
grandfather grandparent grandson husband wife neighbor roommate classmate member animal pet puppy kitten horse pony
cow bull calf pig sheep goat lamb duck goose hen rooster chick rabbit bunny mouse rat hamster squirrel bird parrot
pigeon owl eagle frog toad turtle snake lizard bear lion tiger elephant monkey giraffe zebra deer wolf fox whale shark
dolphin crab lobster shrimp goldfish insect bug bee ant spider butterfly caterpillar beetle ladybug worm snail leg arm
hand head eye ear nose tooth hair finger toe tail wing feather fur wool plant rose tulip daisy lily sunflower bush
leaf branch seed grass weed soil stone rock brick block tile board wood log stick nail screw hammer tool paint brush
bucket can rope wire pipe metal plastic cotton fabric cloth thread button needle quilt blanket pillow towel curtain
carpet rug mirror clock phone call text message computer laptop tablet screen video television channel camera photo
picture album painting poster frame puzzle doll bear lego model action figure marble sticker comic deck trading
collection robot kite bubble bat net helmet skate skateboard scooter slide swing pass membership subscription plan
contract order delivery item product brand stock supply material ingredient recipe cost expense total sum result value
increase decrease change difference remainder average number amount quantity percentage fraction ratio unit level
round turn step stage minute period schedule shift break recess semester course college university degree scholarship
contest competition prize award medal trophy winner vote election candidate population people percent majority charity
donation fund fundraiser raffle booth fair festival carnival ride roller coaster circus magic trick clown costume mask
candy treat scoop cone flavor topping syrup honey jam jelly spread serving calorie protein diet pound load cargo trash
garbage recycling bin waste energy power electricity battery bulb heat fire smoke air wind rain snow storm weather sun
moon star planet space rocket alien ghost witch wizard dragon princess prince king queen castle knight sword treasure
pirate jungle desert cave mine well pond stream waterfall dock anchor sail net hook worm bait author writer reader
editor artist actor actress musician scientist engineer builder carpenter plumber electrician mechanic farmer gardener
cleaner maid barber tailor jeweler florist owner seller vendor buyer tenant landlord lot spot space seat stadium arena
gate entrance exit hall hallway stairs elevator ladder lawn porch driveway garage basement attic bathroom bedroom
shower bath soap shampoo toothpaste lotion makeup perfume lipstick polish tablespoon teaspoon quart pint barrel keg
pot kettle pitcher mug straw napkin wrapper bagel bun roll loaf toast bacon sausage ham steak hotdog taco burrito
noodle spaghetti meatball fries ketchup mustard mayo olive avocado celery spinach broccoli cabbage garlic ginger
cinnamon vanilla yogurt smoothie lemonade cider wine beer cocktail
"""

VERBS = """
buy sell make give take get have eat need want pay spend save earn work cost use find start add read run walk drive
ride go play own bring keep lose collect receive share divide split fill carry hold plant grow pick bake cook drink
pour cut slice wash clean paint build fix break open close write draw color order ship send deliver pack wrap move
travel fly swim jump climb throw catch hit kick score win finish complete begin end stop stay leave arrive return
visit meet invite attend watch see look hear listen talk speak tell say ask answer call help teach learn study
practice train know think decide plan try calculate count measure weigh multiply subtract equal increase decrease
reduce double triple change turn put place set remain total average charge owe borrow lend donate raise contribute
offer hire rent lease live sleep wake wear hang store gather harvest feed breed raise adopt lay hatch hunt fish sew
knit type print copy download watch record record sign vote join form create produce manufacture assemble install
replace repair remove throw empty drop spill burn melt freeze mix stir combine serve include contain consist require
allow receive expect hope wish like love prefer enjoy hate agree accept refuse choose select miss pass fail graduate
enroll register cover reach cross climb follow lead chase escape hide search discover notice realize remember forget
check test prepare celebrate decorate trade exchange swap match compare assume represent last take discount budget
invest deposit withdraw transfer double-check
"""

IRREGULAR = """
feet bought children spent gave took paid got ate went bought sold made gave took got had ate paid spent found ran
drove rode went brought kept lost caught grew drank cut wrote drew sent flew swam met won began left saw heard spoke
told said taught learnt knew thought put slept woke wore held fed bred laid stuck threw chose hid forgot withdrew
built broke froze shot spun bet swept given taken eaten gone been seen written driven ridden grown drunk flown swum
begun spoken known worn chosen hidden forgotten broken frozen thrown children men women feet teeth mice geese leaves
halves shelves knives loaves wives lives wolves thieves selves gallons shoes boxes dishes glasses buses classes inches
lunches sandwiches peaches cherries berries puppies families babies ladies parties cities countries stories copies
pennies hobbies daisies bunnies ponies batteries groceries using making taking giving having driving riding writing
saving sharing baking cutting running swimming getting putting planning shopping stopping dropping wrapping selling
buying eating spending reading working walking playing earning planted planned stopped dropped wrapped traveled scored
shared saved baked used divided multiplied tripled increased decreased reduced donated collected received remaining
total's it's doesn't didn't don't isn't can't that's there's let's he's she's they're i'm purchase purchased age cubic
home kg worth individual goes display meaning tomatoes potatoes crayons calories animals guests calculate
"""

ENDINGS = """
ing ed er ers est ly es s y ies tion ation ment ness less ful able ible ous ive al ic ity ant ent ence ance ure age
ist ism ship hood ward wise teen ty th st nd rd 's 't 'll 've 're n't un re pre non dis mis over under out up in im
inter sub super th sh ch wh qu ck ng ee oo ea ou ai ay ow ew oi oy au aw ie ei ar er ir or ur ll ss tt rr nn mm pp ff
gg dd bb
"""
